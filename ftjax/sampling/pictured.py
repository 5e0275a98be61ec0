"""Images of prompts that are read together."""

import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.models.vision import KEYS, Images


def together(images: Sequence[Images | None], rows: int, length: int) -> Images | None:
    """Arrays of so many rows of `length` tokens; None where there are no images.

    images: of the first of them, one row each. Rows have room for as many patches as the one with the most, doubled
    from there to few sizes.
    """
    given = [its for its in images if its is not None]
    if not given:
        return None
    most = max(len(its.patches) for its in given)
    least = min(len(its.patches) for its in given)
    room = least * 2 ** math.ceil(math.log2(most / least))
    arrays = {
        name: np.zeros((rows, room, *getattr(given[0], name).shape[1:]), getattr(given[0], name).dtype)
        for name in ("patches", "places", "images")
    }
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
