"""Random orders that stay the same in later versions of NumPy."""

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """int64 [n]: a permutation, as a function of the key alone (integers that are not negative).

    NumPy promises that raw bits stay the same in later versions, not that permutations do. 64 bits all but never tie,
    and a stable sort settles it where they do.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")
