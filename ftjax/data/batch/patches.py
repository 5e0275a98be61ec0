"""The images of a batch: their patches, row by row, and where they and the tokens are."""

from collections.abc import Sequence

import numpy as np

from ftjax.data.images import load
from ftjax.data.images.patches import patches, places, rope_positions
from ftjax.data.images.rules import ImageRules
from ftjax.data.tokens.examples import Examples
from ftjax.data.tokens.pictured import pictures
from ftjax.errors import SourceError

# Further arrays of a batch of B rows with room for P patches of p x p pixels each.
PATCHES = {
    "patches": np.uint8,  # [B, P, 3 * p * p]: by channel, row and column
    "patch_places": np.int32,  # [B, P, 2]: row and column in its image
    "patch_images": np.int32,  # [B, P]: 1, 2, ... by image in the row, and 0 for padding
}
# And where positions have parts: time, row and column of each token, from 0 in each document.
ROPE = {"rope_positions": np.int32}  # [B, T, 3]


def room(examples: Examples, rows: Sequence[np.ndarray]) -> int:
    """P of a batch with the examples of these rows, those of all hosts; reads tokens and no image."""
    rules = examples.images
    counts = [
        sum(np.count_nonzero(its.tokens == rules.token_id) for index in row for its in examples.documents_of(index))
        for row in rows
    ]
    return rules.room(int(max(counts, default=0)))


def fill(examples: Examples, rows: Sequence[np.ndarray], T: int, P: int) -> dict[str, np.ndarray]:
    """The arrays of PATCHES and, where the model has such positions, of ROPE for rows of example indices.

    The patches of a row's images lie one image after the other, in the order of their tokens. Each image is read again.

    Raises:
      SourceError: an image is another than when its row was tokenized, or cannot be read any more.
    """
    rules, shape = examples.images, (len(rows), P)
    batch = {
        "patches": np.zeros((*shape, 3 * rules.patch**2), PATCHES["patches"]),
        "patch_places": np.zeros((*shape, 2), PATCHES["patch_places"]),
        "patch_images": np.zeros(shape, PATCHES["patch_images"]),
    }
    if rules.mrope:
        batch["rope_positions"] = np.zeros((len(rows), T, 3), ROPE["rope_positions"])
    for b, row in enumerate(rows):
        start, number, token = 0, 0, 0
        for index in row:
            documents = examples.documents_of(index)
            counts = [int(np.count_nonzero(document.tokens == rules.token_id)) for document in documents]
            images = _images(examples, index, counts) if any(counts) else [[] for _ in counts]
            for document, its in zip(documents, images):
                for of_image, grid in its:
                    place, number = slice(start, start + len(of_image)), number + 1
                    batch["patches"][b, place] = of_image
                    batch["patch_places"][b, place] = places(grid, rules)
                    batch["patch_images"][b, place] = number
                    start += len(of_image)
                stop = token + len(document.tokens)
                if rules.mrope:
                    grids = [grid for _, grid in its]
                    batch["rope_positions"][b, token:stop] = rope_positions(document.tokens, grids, rules)
                token = stop
    return batch


def _images(examples: Examples, index: int, counts: list[int]) -> list[list[tuple[np.ndarray, tuple[int, int]]]]:
    """The patches of each image that each document of an example has tokens of, and its grid."""
    rules, row = examples.images, examples.row(index)
    its = pictures(row, rules)
    used = [its.first(count) for count in counts]
    if its.digest != examples.pictures[index] or None in used:
        raise SourceError(
            f"{row.origin}: its images are others than when this run began to read the data, by their names, pixels or "
            "bytes; start again"
        )
    made = [_patches(reference, rules, row.origin) for reference in its.references[: max(used)]]
    return [made[:count] for count in used]


def _patches(reference: str, rules: ImageRules, origin: str) -> tuple[np.ndarray, tuple[int, int]]:
    image = load.pixels(reference, origin)
    return patches(image, rules), rules.grid(*image.size)
