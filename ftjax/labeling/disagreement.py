"""How far an ensemble of reward models disagrees on pairs: what it could learn from most."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ftjax.errors import UserError
from ftjax.labeling.pairs import Pair

# Conversations that end with an answer, and the tools of each -> float [conversations, heads]: the rewards.
Scorer = Callable[[Sequence[tuple[list[dict], list[dict]]]], np.ndarray]


def of_reward_model(path: str) -> tuple[Callable[[Sequence[Pair]], np.ndarray], int]:
    """(the disagreement of an ensemble on pairs, how many heads it has), of what `rewards.load` takes.

    Raises:
      UserError: there is no reward model, or it has one head. Later: its rewards are no finite numbers.
    """
    from ftjax import rewards  # its imports take seconds, and labeling without an ensemble needs none of them

    model = rewards.load(path)
    if model.heads < 2:
        raise UserError(
            f"--reward {path}: has one head, and only several can disagree; train it with --config.objective.ensemble=5"
        )

    def scorer(conversations: Sequence[tuple[list[dict], list[dict]]]) -> np.ndarray:
        found = model.scores_of([model.tokens(turns, tools or None) for turns, tools in conversations])
        if not np.isfinite(found).all():
            raise UserError(f"--reward {path}: gives rewards that are no finite numbers; train it again")
        return found

    return functools.partial(disagreement, scorer=scorer), model.heads


def disagreement(pairs: Sequence[Pair], scorer: Scorer) -> np.ndarray:
    """float64 [pairs]: the variance over the heads of reward(a) - reward(b). Each answer is scored once."""
    answered = [[(pair.prompt + answer, list(pair.tools)) for answer in (pair.a, pair.b)] for pair in pairs]
    number: dict[str, int] = {}  # of each conversation, by what it says
    sides = [[number.setdefault(repr(one), len(number)) for one in both] for both in answered]
    unique = {repr(one): one for both in answered for one in both}
    rewards = np.asarray(scorer(list(unique.values())), np.float64)[np.reshape(sides, (-1, 2))]  # [pairs, 2, heads]
    return (rewards[:, 0] - rewards[:, 1]).var(axis=-1)
