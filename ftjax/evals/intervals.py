"""Confidence intervals by the bootstrap: examples are drawn again with replacement, 9,999 times, from one seed."""

import math

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
_RESAMPLES = 9999
_VALUES = 2**22  # that are held at once


def interval(values: ArrayLike, weights: ArrayLike | None = None) -> list[float] | None:
    """The 95 % interval of sum(values) / sum(weights), each example drawn as a whole; None of fewer than two examples.

    For two contestants on the same examples give their differences: then an example is drawn for both at once (the
    paired bootstrap: Efron and Tibshirani 1993, section 8.3; for text Koehn 2004). By percentiles, since what corrects
    their bias (BCa) is undefined where all values are equal, as they are if every answer is wrong.

    Args:
      values: float [n], such as scores; or sums, such as losses of rows.
      weights: float [n], such as how many tokens each sum has; None: 1 each, so that it is the mean.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (values, weights),
        lambda sums, of, axis: sums.sum(axis) / of.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(_VALUES // len(values), 1),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(found.low), float(found.high)]


def examples_needed(differences: ArrayLike) -> int | None:
    """How many examples would tell a mean difference like this one from 0, at 95 % in four of five tries.

    By the normal approximation: n = ((1.96 + 0.84) deviation / mean)^2. None where the mean is 0, or there are fewer
    than two.
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) < 2 or not (mean := differences.mean()):
        return None
    return math.ceil((2.8 * differences.std(ddof=1) / mean) ** 2)
