"""Attention on CPUs whose matrix products oneDNN makes: of whole rows, as accelerators' kernels, no scores in memory;
and of next tokens to those in a cache.

`onednn_attention.h` and `onednn_next_token.h` compute it, see there. Where the CPU multiplies bfloat16, queries, keys,
values, weights and gradients of whole rows are rounded to that, as under torch's autocast; all else is float32.
"""

import jax
import jax.numpy as jnp

from ftjax.models import onednn
from ftjax.models.spec import DecoderSpec


def cannot(spec: DecoderSpec, shares: bool) -> str:
    """What it cannot serve, in rows of documents that share what they begin with if `shares`; "" if it can."""
    reasons = {
        "soft caps": spec.attention_softcap is not None,
        "sinks": spec.attention_sinks,
        "windows over a shared beginning": shares and any(window is not None for window in spec.layer_windows),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
    positions: jax.Array | None = None,
    until: jax.Array | None = None,
) -> jax.Array:
    """As models.attention.attention, of whole rows on one device, whose tokens of a segment lie one after the other.

    positions, until: int32 [B, T], where documents share what they begin with, without a window (`attention.Shared`).

    Raises:
      UserError: oneDNN cannot be had on this machine.
    """
    onednn.load()
    given = (x.astype(jnp.float32) for x in (queries * jnp.asarray(scale, queries.dtype), keys, values))
    first = first_seen(segments, window, positions)
    until = jnp.full_like(first, segments.shape[1]) if until is None else until
    return _attention(*given, jnp.stack([first, until], axis=1)).astype(queries.dtype)


def of_next_token(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cached_keys: jax.Array,
    cached_values: jax.Array,
    layer: jax.Array,
    positions: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """As models.attention.attention_after, of one token of each row and one layer of those that a cache has.

    All are float32: queries [B, 1, H, d]; keys [B, K, 1, d], values [B, K, 1, e] of the tokens; cached_*
    [layers, B, K, S, d or e]; layer int32, a scalar; positions int32 [B, 1]. Returns [B, 1, H, e].

    Raises:
      UserError: oneDNN cannot be had on this machine.
      ValueError: shapes or dtypes are not these. What computes it looks at no more than the cache's, and would read
        beyond the others.
    """
    onednn.load()
    given = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "cached keys": cached_keys,
        "cached values": cached_values,
    }
    (batch, _, heads, width), (layers, _, kv_heads, slots, value_width) = queries.shape, cached_values.shape
    own, cached = (batch, kv_heads, 1), (layers, batch, kv_heads, slots)
    wanted = [(batch, 1, heads, width), (*own, width), (*own, value_width), (*cached, width), (*cached, value_width)]
    for (name, x), shape in zip(given.items(), wanted, strict=True):
        if x.shape != shape or x.dtype != jnp.float32:
            raise ValueError(f"{name} are {x.dtype} {x.shape}, and would have to be float32 {shape}")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads do not share {kv_heads} heads of keys evenly")
    upto = positions[:, 0]
    first = jnp.zeros_like(upto) if window is None else jnp.maximum(upto - jnp.reshape(window, -1) + 1, 0)
    shape = (batch, heads, cached_values.shape[-1])
    if 0 in shape:
        return jnp.zeros((batch, 1, *shape[1:]), jnp.float32)
    call = jax.ffi.ffi_call(onednn.OF_NEXT_TOKEN, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    queries, keys, values = queries[:, 0] * jnp.float32(scale), keys[:, :, 0], values[:, :, 0]
    seen = jnp.stack([first, upto], axis=1).astype(jnp.int32)
    return call(queries, keys, values, cached_keys, cached_values, layer.astype(jnp.int32), seen)[:, None]


def first_seen(segments: jax.Array, window: int | jax.Array | None, positions: jax.Array | None = None) -> jax.Array:
    """int32 [B, T]: where in its row the first token lies that each token of segments int32 [B, T] sees.

    positions: int32 [B, T], where documents share what they begin with; without, each sees its own segment alone.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    begins = begins if positions is None else begins & (positions == 0)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return first if window is None else jnp.maximum(first, index - window + 1)


@jax.custom_vjp
def _attention(queries, keys, values, seen):
    """seen: int32 [B, 2, T], the first key that each token sees, and the first token after each that sees it no more"""
    shape = (*queries.shape[:3], values.shape[3])
    if 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(onednn.ATTENTION, result, vmap_method="sequential")(queries, keys, values, seen)


def _forward(*given):
    return _attention(*given), given


def _backward(given, gradient):
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in given[:3])
    if 0 in gradient.shape:
        return *(jnp.zeros(x.shape, x.dtype) for x in shapes), None
    call = jax.ffi.ffi_call(onednn.ATTENTION_GRADIENTS, shapes, vmap_method="sequential")
    return *call(*given, gradient), None


_attention.defvjp(_forward, _backward)
