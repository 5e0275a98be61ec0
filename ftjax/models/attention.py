"""Causal grouped-query attention over packed, padded or cached sequences, with rotary positions."""

import jax
import jax.numpy as jnp

# Finite, so that a query with nothing to attend to (padding) yields a mean instead of NaN.
MASKED = -1e30


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, section 3.4), the two halves of a head paired as Hugging Face does.

    x: [batch, length, heads, head_dim]; positions: int32 [batch, length]. Angles are float32 whatever x's dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [batch, length, half]
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """Softmax attention, Ainslie et al. 2023 grouping; softmax in float32.

    queries [B, T, H, d]; keys, values [B, S, K, d] with K dividing H; positions and segments int32 [B, T] or [B, S].
    A token sees the tokens of its own segment at its own and earlier positions. Returns [B, T, H, d] in queries' dtype.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # The heads of a group are rows of one matrix product against their shared keys. Batch dimensions stand in front:
    # XLA on CPUs is several times slower with them elsewhere.
    grouped = queries.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim) * jnp.asarray(head_dim**-0.5, queries.dtype)
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkxd,bksd->bkxs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, length, keys.shape[2])
    same_segment = query_segments[:, :, None] == key_segments[:, None, :]
    not_later = query_positions[:, :, None] >= key_positions[:, None, :]
    scores = jnp.where((same_segment & not_later)[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(batch, kv_heads, -1, keys.shape[2])
    out = jnp.einsum("bkxs,bksd->bkxd", weights, values).reshape(batch, kv_heads, -1, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
