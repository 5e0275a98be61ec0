"""Noise on the embeddings in training: NEFTune (Jain et al. 2023, arXiv 2310.05914)."""

import jax
import jax.numpy as jnp

from ftjax.models.rope import sequence_lengths


def noise(rng: jax.Array, positions: jax.Array, segment_ids: jax.Array, width: int, alpha: float) -> jax.Array:
    """float32 [B, T, width], uniform between -s and s with s = alpha / sqrt(L width); 0 where there is no token.

    positions, segment_ids: int32 [B, T]. L is the number of tokens of a token's own document: the paper has one to a
    row, and padding or what else is packed into the row is no part of it. Each token's draw is decided by rng and its
    index in the batch, so that it does not depend on how the batch is split over devices.
    """
    lengths = jnp.broadcast_to(sequence_lengths(positions, segment_ids), positions.shape)
    size = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * jnp.float32(width))
    index = jnp.arange(positions.size)
    draw = jax.vmap(lambda one: jax.random.uniform(jax.random.fold_in(rng, one), (width,), minval=-1.0, maxval=1.0))
    uniform = draw(index).reshape(*positions.shape, width)
    return uniform * jnp.where(segment_ids > 0, size, 0)[..., None]
