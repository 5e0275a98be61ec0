"""How far labelers agree beyond chance, where more than one judged a pair. Skips say nothing and are left out."""

import collections
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ftjax.labeling.journal import Labels


class Agreement(NamedTuple):
    """Of the pairs that two or more judged.

    Attributes:
      pairs: how many.
      share: of all two judgements of one pair, how many are the same.
      name, value: Cohen's kappa of two labelers, Krippendorff's alpha of more: 1 is perfect, 0 is chance. None where
        all judgements are the same, of which chance says nothing.
    """

    pairs: int
    share: float
    name: str
    value: float | None


def agreement(labels: Labels) -> Agreement | None:
    """None where no pair was judged by two."""
    judged = [{who: label.choice for who, label in by.items() if label.choice != "skip"} for by in labels.values()]
    units = [choices for choices in judged if len(choices) > 1]
    if not units:
        return None
    both = [one == other for choices in units for one, other in itertools.combinations(choices.values(), 2)]
    labelers = sorted({who for choices in units for who in choices})
    if len(labelers) == 2:
        name, value = "Cohen's kappa", kappa([tuple(choices[who] for who in labelers) for choices in units])
    else:
        name, value = "Krippendorff's alpha", alpha([list(choices.values()) for choices in units])
    return Agreement(len(units), sum(both) / len(both), name, value)


def kappa(judgements: Sequence[tuple[str, str]]) -> float | None:
    """Cohen (1960): of two labelers' categories of the same items. None where chance alone gives full agreement."""
    n = len(judgements)
    first, second = (collections.Counter(column) for column in zip(*judgements))
    observed = sum(one == other for one, other in judgements) / n
    chance = sum(first[category] * second[category] for category in first) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def alpha(judgements: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff (2011) for nominal data: of each item the categories that any two or more labelers gave it.

    None where there is only one category.
    """
    totals = collections.Counter(category for categories in judgements for category in categories)
    n = sum(totals.values())
    observed = 0.0  # disagreement
    for categories in judgements:
        counts = collections.Counter(categories).values()
        observed += (sum(counts) ** 2 - sum(count**2 for count in counts)) / (sum(counts) - 1)
    expected = (n**2 - sum(count**2 for count in totals.values())) / (n - 1)
    return None if expected == 0 else 1 - observed / expected
