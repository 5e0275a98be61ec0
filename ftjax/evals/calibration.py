"""Whether a reward model is as often right as it says: of pairs of which a person said which answer is better."""

from typing import NamedTuple

import numpy as np


class Bin(NamedTuple):
    """The pairs in whose better answer there is so much confidence.

    Attributes:
      low, high: confidences p, low <= p < high; the last bin has 1 too.
      count: how many pairs.
      confidence: their mean p; NaN of no pairs, like `accuracy`.
      accuracy: the share of them in which the answer that is preferred is the better one.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """What comes of N pairs.

    Attributes:
      accuracy: the share in which the better answer is preferred, with p > 1/2.
      error: the expected calibration error, the mean over pairs of |accuracy - confidence| of their bin (Naeini et al.
        2015; Guo et al. 2017, equation 3).
      brier: the mean of (1 - p)^2, p being the probability that is given to the better answer (Brier 1950).
      bins: of equal width from 1/2 to 1, for a pair has one answer that is preferred.
    """

    accuracy: float
    error: float
    brier: float
    bins: tuple[Bin, ...]


def calibration(likelihood: np.ndarray, bins: int = 10) -> Calibration:
    """likelihood: float [N], N > 0: the probability that is given to the answer which is the better one."""
    p = np.asarray(likelihood, np.float64)
    right, confidence = p > 0.5, np.maximum(p, 1 - p)
    edges = np.linspace(0.5, 1, bins + 1)
    where = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    counts = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidences, accuracies = (np.bincount(where, values, bins) / counts for values in (confidence, right))
    error = np.nansum(counts * np.abs(accuracies - confidences)) / len(p)
    columns = (edges[:-1], edges[1:], counts, confidences, accuracies)
    found = tuple(Bin(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
    return Calibration(float(right.mean()), float(error), float(np.mean((1 - p) ** 2)), found)
