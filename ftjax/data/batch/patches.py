"""The images of a batch: their patches, row by row, and where they and the tokens are."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ftjax.data.images import load
from ftjax.data.images.patches import patches, places, rope_positions
from ftjax.data.images.rules import ImageRules
from ftjax.data.tokens.examples import Examples
from ftjax.data.tokens.pictured import NONE, pictures
from ftjax.errors import SourceError

MAX_READERS = 8  # threads that read the images of a batch

# Further arrays of a batch of B rows with room for P patches of p x p pixels each.
PATCHES = {
    "patches": np.uint8,  # [B, P, 3 * p * p]: by channel, row and column
    "patch_places": np.int32,  # [B, P, 2]: row and column in its image
    "patch_images": np.int32,  # [B, P]: 1, 2, ... by image in the row, and 0 for padding
}
# And where positions have parts: time, row and column of each token, from 0 in each document.
ROPE = {"rope_positions": np.int32}  # [B, T, 3]


class Seen(NamedTuple):
    """A document with its images.

    Attributes:
      tokens: int [n].
      references: of the images that it has the tokens of, in order.
      origin: of its row, for messages.
    """

    tokens: np.ndarray
    references: tuple[str, ...]
    origin: str


def room(examples: Examples, rows: Sequence[np.ndarray]) -> int:
    """P of a batch with the examples of these rows, those of all hosts; reads tokens and no image."""
    rules = examples.images
    counts = [sum(_count(its.tokens, rules) for index in row for its in examples.documents_of(index)) for row in rows]
    return rules.room(max(counts, default=0))


def fill(examples: Examples, rows: Sequence[np.ndarray], T: int, P: int) -> dict[str, np.ndarray]:
    """The arrays of `lay` for rows of example indices; each image is read again.

    Raises:
      SourceError: an image is another than when its row was tokenized.
      UserError: one cannot be read any more, or is damaged.
    """
    return lay([[its for index in row for its in _seen(examples, index)] for row in rows], T, P, examples.images)


def lay(rows: Sequence[Iterable[Seen]], T: int, P: int, rules: ImageRules) -> dict[str, np.ndarray]:
    """The arrays of PATCHES and, where the model has such positions, of ROPE, for rows of documents.

    The patches of a row lie one image after the other, in the order of their tokens. Images are read side by side.
    """
    rows, shape = [list(row) for row in rows], (len(rows), P)
    origins = {reference: its.origin for row in rows for its in row for reference in its.references}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_READERS)) as pool:  # Pillow lets other threads work meanwhile
        made = pool.map(lambda reference: _patches(reference, origins[reference], rules), origins)
        read = dict(zip(origins, made, strict=True))
    batch = {
        "patches": np.zeros((*shape, 3 * rules.patch**2), PATCHES["patches"]),
        "patch_places": np.zeros((*shape, 2), PATCHES["patch_places"]),
        "patch_images": np.zeros(shape, PATCHES["patch_images"]),
    }
    if rules.mrope:
        batch["rope_positions"] = np.zeros((len(rows), T, 3), ROPE["rope_positions"])
    for b, row in enumerate(rows):
        start, number, token = 0, 0, 0
        for tokens, references, _ in row:
            grids = []
            for reference in references:
                of_image, grid = read[reference]
                place, number = slice(start, start + len(of_image)), number + 1
                batch["patches"][b, place] = of_image
                batch["patch_places"][b, place] = places(grid, rules)
                batch["patch_images"][b, place] = number
                start += len(of_image)
                grids.append(grid)
            if rules.mrope:
                batch["rope_positions"][b, token : token + len(tokens)] = rope_positions(tokens, grids, rules)
            token += len(tokens)
    return batch


def _seen(examples: Examples, index: int) -> list[Seen]:
    """The documents of an example. Its row is read only if they have tokens of images."""
    documents, its, origin = examples.documents_of(index), NONE, ""
    counts = [_count(document.tokens, examples.images) for document in documents]
    if any(counts):
        row = examples.row(index)
        its, origin = pictures(row, examples.images), row.origin
        if its.digest != examples.pictures[index]:
            raise SourceError(
                f"{origin}: its images are others than when this run began to read the data, by their names, pixels or "
                "bytes; start again"
            )
    used = [its.references[: its.first(count)] for count in counts]
    return [Seen(document.tokens, references, origin) for document, references in zip(documents, used)]


def _patches(reference: str, origin: str, rules: ImageRules) -> tuple[np.ndarray, tuple[int, int]]:
    """The patches of an image, and its rows and columns of them."""
    image = load.pixels(reference, origin)
    return patches(image, rules), rules.grid(*image.size)


def _count(tokens: np.ndarray, rules: ImageRules) -> int:
    return int(np.count_nonzero(tokens == rules.token_id))
