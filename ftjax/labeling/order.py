"""Which pairs to ask about first (Christiano et al. 2017, arXiv:1706.03741, section 2.2.4)."""

from collections.abc import Callable, Sequence

import numpy as np

from ftjax.labeling.draws import draw
from ftjax.labeling.pairs import Pair

Disagreement = Callable[[Sequence[Pair]], np.ndarray]  # pairs -> float [pairs]: how far an ensemble disagrees on each


def order(pairs: Sequence[Pair], disagreement: Disagreement | None = None, seed: int = 0) -> list[Pair]:
    """The pairs on which the ensemble disagrees most first; equal ones, and all without an ensemble, in random order.

    The random order is that of the pairs' ids: it is the same for every subset of them and however they were sorted.

    Raises:
      ValueError: there is not one finite number for each pair.
    """
    shuffled = sorted(pairs, key=lambda pair: draw(seed, "order", pair.id))
    if disagreement is None:
        return shuffled
    values = np.asarray(disagreement(shuffled), np.float64)
    if values.shape != (len(shuffled),) or not np.isfinite(values).all():
        raise ValueError(f"the disagreement must be {len(shuffled)} finite numbers; its shape is {values.shape}")
    return [shuffled[i] for i in np.argsort(-values, kind="stable")]
