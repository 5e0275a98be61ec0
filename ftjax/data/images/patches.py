"""Images -> patches in the order of their tokens, and the positions of tokens in time and space."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data.images.rules import ImageRules

if TYPE_CHECKING:
    from PIL.Image import Image


def patches(image: "Image", rules: ImageRules) -> np.ndarray:
    """uint8 [n, 3 * patch * patch]: the patches of an RGB image after it is resized, each by channel, row, column.

    They are in blocks of merge x merge, which are one token: blocks row by row, inside a block row by row.
    """
    rows, columns = rules.grid(*image.size)
    sized = image.resize((columns * rules.patch, rows * rules.patch), resample=rules.resample)
    m, p = rules.merge, rules.patch
    # block row, row in it, row in the patch, block column, column in it, column in the patch, channel
    parts = np.asarray(sized).reshape(rows // m, m, p, columns // m, m, p, 3)
    return parts.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3 * p * p)


def places(grid: tuple[int, int], rules: ImageRules) -> np.ndarray:
    """int32 [n, 2]: row and column of each of the patches of an image, in their order."""
    (rows, columns), m = grid, rules.merge
    every = np.stack(np.mgrid[:rows, :columns], axis=-1).reshape(rows // m, m, columns // m, m, 2)
    return every.transpose(0, 2, 1, 3, 4).reshape(rows * columns, 2).astype(np.int32)


def rope_positions(tokens: np.ndarray, grids: Sequence[tuple[int, int]], rules: ImageRules) -> np.ndarray:
    """int32 [n, 3]: time, row and column of each token of a document, as Qwen2-VL has them (arXiv 2409.12191, 2.1).

    Tokens of text have one number three times, one more than the largest before. Those of an image have that number as
    their time; their row and column count from it.

    Args:
      tokens: int [n].
      grids: rows and columns of patches of each of its images, all of whose tokens are in it.
    """
    out, start, done = np.zeros((len(tokens), 3), np.int32), 0, 0
    pictured = np.flatnonzero(tokens == rules.token_id)
    for grid in grids:
        rows, columns = (side // rules.merge for side in grid)
        first = int(pictured[0])
        out[done:first] = (start + np.arange(first - done))[:, None]
        start += first - done
        done = first + rows * columns
        places = np.stack(np.mgrid[:1, :rows, :columns], axis=-1).reshape(-1, 3)
        out[first:done] = start + places
        start += max(rows, columns)
        pictured = pictured[rows * columns :]
    out[done:] = (start + np.arange(len(tokens) - done))[:, None]
    return out
