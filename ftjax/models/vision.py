"""Images in a batch: their arrays, where their embeddings stand among those of tokens, and which tokens see which."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.models.spec import Vision


class Images(NamedTuple):
    """The images of a batch of B rows of T tokens, P patches of p x p pixels in each row.

    The patches of an image lie in blocks of merge x merge, row by row, and those of a block row by row; images lie in
    the order of their tokens. So the patches of a row's k-th token of an image are its k-th merge * merge ones.
    """

    patches: jax.Array | None  # uint8 [B, P, 3 p p]: colors, each row by row
    places: jax.Array | None  # int32 [B, P, 2]: row and column of the patch in its image
    images: jax.Array | None  # int32 [B, P]: 1, 2, ... by image; 0 is padding
    # int32 [B, T, 3], of M-RoPE alone, also without images: a token's temporal, vertical and horizontal position.
    rope_positions: jax.Array | None = None


KEYS = {"patches": "patches", "places": "patch_places", "images": "patch_images", "rope_positions": "rope_positions"}


def images_of(batch: Mapping[str, jax.Array]) -> Images | None:
    """What a batch has of images, for `Decoder`; None of text alone."""
    if not any(key in batch for key in KEYS.values()):
        return None
    return Images(**{field: batch.get(key) for field, key in KEYS.items()})


def with_images(vision: Vision, x: jax.Array, tokens: jax.Array, features: jax.Array) -> jax.Array:
    """x [B, T, D] with what the tower gives, [B, F, D], in the places of a row's tokens of images, in order.

    tokens: int32 [B, T]. A row may have fewer tokens of images than F, and not more.
    """
    stands = tokens == vision.image_token
    which = jnp.maximum(jnp.cumsum(stands, axis=1) - 1, 0)
    found = jnp.take_along_axis(features, which[..., None], axis=1, mode="clip")
    return jnp.where(stands[..., None], found.astype(x.dtype), x)


def last_seen(vision: Vision, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """int32 [B, T]: the last position that each token sees: of an image's tokens that of its last one, else its own.

    Tokens of images that follow each other, in one segment, are of one image. All arguments int32 [B, T].
    """
    stands = tokens == vision.image_token
    goes_on = stands[:, :-1] & (segment_ids[:, 1:] == segment_ids[:, :-1])
    begins = stands & ~jnp.pad(goes_on, ((0, 0), (1, 0)))
    runs, count = jnp.cumsum(begins, axis=1), tokens.shape[1] + 1
    ends = jax.vmap(lambda position, run: jax.ops.segment_max(position, run, count)[run])(
        jnp.where(stands, positions, 0), runs
    )
    return jnp.where(stands, ends, positions)
