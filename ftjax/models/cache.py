"""The key/value cache of incremental decoding: a pytree that goes in and comes out, never module state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.models.groups import Stack, nested
from ftjax.models.spec import DecoderSpec


@flax.struct.dataclass
class Cache:
    """Keys and values of the `length` slots written so far, the same slots for every row of the batch.

    Rows of different prompt lengths are padded on the left; a padded slot keeps segment id 0 and is never attended to.
    """

    # [layers, batch, slots, kv_heads, head_dim] of each stack of layers (groups.nested), in the compute dtype, RoPE
    # applied. An array for each: slices of one for all would be copied for every token.
    keys: Any
    values: Any  # as keys
    positions: jax.Array  # int32 [batch, slots]
    segment_ids: jax.Array  # int32 [batch, slots], 0 where nothing may be attended to
    length: jax.Array  # int32 scalar
    reach: jax.Array  # int32 [batch], how long each row may become: LongRoPE has to know it from the first token on


def init_cache(spec: DecoderSpec, batch: int, slots: int, dtype: jnp.dtype, reach: jax.Array | None = None) -> Cache:
    """An empty cache; a row becomes at most `reach` tokens long, by default `slots`."""

    def zeros(stack: Stack) -> jax.Array:
        heads, head_dim = stack.spec.num_key_value_heads, stack.spec.head_dim
        return jnp.zeros((len(stack.layers), batch, slots, heads, head_dim), dtype)

    return Cache(
        keys=nested(spec, zeros),
        values=nested(spec, zeros),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        reach=jnp.full((batch,), slots, jnp.int32) if reach is None else reach,
    )


def write(buffer: jax.Array, new: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """Puts `new` into `buffer`, [batch, slots, ...] or with layers in front (axis 2), at slots start .. start + n."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), start, axis=axis)
