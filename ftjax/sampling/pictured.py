"""Prompts with images, and these of prompts that are read together."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.models.vision import KEYS, Images


@dataclasses.dataclass(frozen=True, eq=False)
class Pictured:
    """A prompt with images.

    tokens: int32 [length]. images: NumPy arrays as `Images` has them, of one row: of `length` tokens, and with room for
    one of few numbers of patches, since each is compiled.
    """

    tokens: np.ndarray
    images: Images

    def __len__(self) -> int:
        return len(self.tokens)


def contents(prompt: np.ndarray | Pictured) -> list[int | str]:
    """What tells a prompt from others, as JSON: its tokens, and a digest of its images."""
    if not isinstance(prompt, Pictured):
        return prompt.tolist()
    digest = hashlib.sha256()
    for array in (prompt.images.patches, prompt.images.places, prompt.images.images):
        digest.update(np.ascontiguousarray(array))
    return [*prompt.tokens.tolist(), digest.hexdigest()]


def together(images: Sequence[Images | None], rows: int, length: int) -> Images | None:
    """Arrays of so many rows of `length` tokens; None where there are no images.

    images: those of the first of them (`Pictured`).
    """
    given = [its for its in images if its is not None]
    if not given:
        return None
    room, arrays = max(len(its.patches) for its in given), {}
    for name in ("patches", "places", "images"):
        like = getattr(given[0], name)
        arrays[name] = np.zeros((rows, room, *like.shape[1:]), like.dtype)
    turned = None
    if given[0].rope_positions is not None:
        turned = np.broadcast_to(np.arange(length, dtype=np.int32)[:, None], (rows, length, 3)).copy()
    for row, its in enumerate(images):
        if its is None:
            continue
        for name, array in arrays.items():
            values = getattr(its, name)
            array[row, : len(values)] = values
        if turned is not None:
            turned[row, : len(its.rope_positions)] = its.rope_positions
    return Images(**arrays, rope_positions=turned)


def placed(mesh: Mesh, images: Images) -> Images:
    """The same on a mesh."""
    arrays = {KEYS[name]: array for name, array in images._asdict().items() if array is not None}
    found = sharding.placed(mesh, arrays)
    return Images(*(found.get(KEYS[name]) for name in Images._fields))
