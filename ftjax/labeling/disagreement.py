"""How far an ensemble of reward models disagrees on pairs: what it could learn from most."""

from collections.abc import Callable, Sequence

import numpy as np

from ftjax.labeling.pairs import Pair

# Conversations that end with an answer, and the tools of each -> float [conversations, heads]: the rewards.
Scorer = Callable[[Sequence[tuple[list[dict], list[dict]]]], np.ndarray]


def disagreement(pairs: Sequence[Pair], scorer: Scorer) -> np.ndarray:
    """float64 [pairs]: the variance over the heads of reward(a) - reward(b). Each answer is scored once."""
    answered = [[(pair.prompt + answer, list(pair.tools)) for answer in (pair.a, pair.b)] for pair in pairs]
    number: dict[str, int] = {}  # of each conversation, by what it says
    sides = [[number.setdefault(repr(one), len(number)) for one in both] for both in answered]
    unique = {repr(one): one for both in answered for one in both}
    rewards = np.asarray(scorer(list(unique.values())), np.float64)[np.reshape(sides, (-1, 2))]  # [pairs, 2, heads]
    return (rewards[:, 0] - rewards[:, 1]).var(axis=-1)
