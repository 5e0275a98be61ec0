"""Attention of whole rows on CPUs whose matrix products oneDNN makes: as accelerators' kernels, no scores in memory.

`onednn_attention.h` computes it, see there. Where the CPU multiplies bfloat16, queries, keys, values, weights and
gradients are rounded to that, as under torch's autocast; all else is float32.
"""

import jax
import jax.numpy as jnp

from ftjax.models import onednn
from ftjax.models.spec import DecoderSpec


def cannot(spec: DecoderSpec) -> str:
    """What it cannot serve; "" if it can."""
    reasons = {"soft caps": spec.attention_softcap is not None, "sinks": spec.attention_sinks}
    return next((reason for reason, holds in reasons.items() if holds), "")


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """As models.attention.attention, of whole rows on one device, whose tokens of a segment lie one after the other.

    Raises:
      UserError: oneDNN cannot be had on this machine.
    """
    onednn.load()
    given = (x.astype(jnp.float32) for x in (queries * jnp.asarray(scale, queries.dtype), keys, values))
    return _attention(*given, first_seen(segments, window)).astype(queries.dtype)


def first_seen(segments: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """int32 [B, T]: where in its row the first token lies that each token of segments int32 [B, T] sees."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return first if window is None else jnp.maximum(first, index - window + 1)


@jax.custom_vjp
def _attention(queries, keys, values, first):
    shape = (*queries.shape[:3], values.shape[3])
    if 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(onednn.ATTENTION, result, vmap_method="sequential")(queries, keys, values, first)


def _forward(*given):
    return _attention(*given), given


def _backward(given, gradient):
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in given[:3])
    if 0 in gradient.shape:
        return *(jnp.zeros(x.shape, x.dtype) for x in shapes), None
    call = jax.ffi.ffi_call(onednn.ATTENTION_GRADIENTS, shapes, vmap_method="sequential")
    return *call(*given, gradient), None


_attention.defvjp(_forward, _backward)
