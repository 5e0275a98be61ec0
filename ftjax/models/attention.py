"""Causal grouped-query attention over packed, padded or cached sequences."""

import jax
import jax.numpy as jnp

# Finite, so that a query with nothing to attend to (padding) yields a mean instead of NaN.
MASKED = -1e30


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, Ainslie et al. 2023 grouping; softmax in float32.

    queries [B, T, H, d]; keys, values [B, S, K, d] with K dividing H; positions and segments int32 [B, T] or [B, S].
    A token sees the tokens of its own segment at its own and earlier positions, the last `window` of them if given.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2). sinks [H]: one more score per head in the softmax's
    denominator (GPT-OSS). Returns [B, T, H, d] in queries' dtype.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # The heads of a group are rows of one matrix product against their shared keys. Batch dimensions stand in front:
    # XLA on CPUs is several times slower with them elsewhere.
    grouped = queries.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim) * jnp.asarray(scale, queries.dtype)
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkxd,bksd->bkxs", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, -1, length, keys.shape[2])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = sees(query_positions, key_positions, query_segments, key_segments, window)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        largest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
        weights = jnp.exp(scores - largest)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest))
    weights = weights.astype(values.dtype).reshape(batch, kv_heads, -1, keys.shape[2])
    out = jnp.einsum("bkxs,bksd->bkxd", weights, values).reshape(batch, kv_heads, -1, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def sees(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """bool [B, T, S]: which keys each query sees."""
    same_segment = query_segments[:, :, None] == key_segments[:, None, :]
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = same_segment & (distance >= 0)
    return seen if window is None else seen & (distance < window)
