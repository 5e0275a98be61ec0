"""The key/value cache of incremental decoding: a pytree that goes in and comes out, never module state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.models.groups import Stack, nested
from ftjax.models.spec import DecoderSpec


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens before. Each row counts for itself: the token at position p is in slot p.

    So nothing needs to be said of what a slot holds: what lies beyond a row's own position was never written, or by an
    earlier use of the row, and is not attended to.
    """

    # [layers, batch, kv_heads, slots, head_dim] of each stack of layers (groups.nested), in the compute dtype, RoPE
    # applied; () of layers that use another's. An array for each: slices of one for all would be copied for every
    # token.
    keys: Any
    values: Any  # as keys
    reach: jax.Array  # int32 [batch], how long each row may become: LongRoPE has to know it from the first token on


def init_cache(
    spec: DecoderSpec,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    reach: jax.Array | None = None,
) -> Cache:
    """An empty cache; a row becomes at most `reach` tokens long, by default `slots`."""

    def zeros(stack: Stack) -> jax.Array | tuple[()]:
        if stack.spec.kv_layer is not None:
            return ()
        heads, head_dim = stack.spec.num_key_value_heads, stack.spec.head_dim
        return jnp.zeros((len(stack.layers), batch, heads, slots, head_dim), dtype)

    return Cache(
        keys=nested(spec, zeros),
        values=nested(spec, zeros),
        reach=jnp.full((batch,), slots, jnp.int32) if reach is None else reach,
    )


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Puts new [layers, batch, kv_heads, T, d] into buffer [layers, batch, kv_heads, slots, d], each token at its
    position, int32 [batch, T]; not those of segment 0.
    """
    slots = jnp.where(segment_ids > 0, positions, buffer.shape[3])
    rows = jnp.arange(buffer.shape[1])[:, None]
    # Indexed dimensions come first: [batch, T, layers, kv_heads, d].
    return buffer.at[:, rows, :, slots].set(new.astype(buffer.dtype).transpose(1, 3, 0, 2, 4), mode="drop")
