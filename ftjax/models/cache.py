"""The cache of incremental decoding: a pytree that goes in and comes out, never module state."""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.models.groups import Stack, nested, stacks
from ftjax.models.spec import DecoderSpec


class State(NamedTuple):
    """What layers that are not attention alone carry along a row. It cannot be cut back."""

    inputs: jax.Array  # [layers, batch, taps - 1, channels] of the last tokens, in the compute dtype
    memory: jax.Array | None  # float32 [layers, batch, *spec.Delta.memory]; None of convolutions alone


@flax.struct.dataclass
class InPlace:
    """Where a layer's keys and values lie in a cache, for what reads them there: a slice would be a copy of all."""

    stack: str = flax.struct.field(pytree_node=False)  # the path of a groups.Stack
    layer: jax.Array  # int32 [layers], for `nn.scan` to go over; of one layer a scalar


class Both(NamedTuple):
    """What a layer has that attends and carries a State beside it."""

    attended: Any  # keys and values
    state: State


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens before. Each row counts for itself: the token at position p is in slot p.

    So nothing needs to be said of what a slot holds: what lies beyond a row's own position was never written, or by an
    earlier use of the row, and is not attended to. A State is that of all tokens before, and not looked at where a row
    begins, at position 0.
    """

    # [layers, batch, kv_heads, slots, head_dim] of each stack of layers (groups.nested), in the compute dtype, RoPE
    # applied; None of a stack without attention, () of one that uses another's. An array for each: slices of one for
    # all would be copied for every token. Of latent attention too these are whole keys and values, not what they are
    # made of.
    keys: Any
    values: Any  # as keys, of value_dim
    states: Any  # State of each stack that has one; None of those with keys alone, () of those that use another's
    reach: jax.Array  # int32 [batch], how long each row may become: LongRoPE has to know it from the first token on


def init_cache(
    spec: DecoderSpec,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    reach: jax.Array | None = None,
) -> Cache:
    """An empty cache; a row becomes at most `reach` tokens long, by default `slots`."""

    def zeros(width: str, stack: Stack) -> jax.Array | tuple[()] | None:
        if not stack.spec.attends:
            return None
        if stack.spec.kv_layer is not None:
            return ()
        heads, columns = stack.spec.num_key_value_heads, getattr(stack.spec, width)
        return jnp.zeros((len(stack.layers), batch, heads, slots, columns), dtype)

    def state(stack: Stack) -> State | tuple[()] | None:
        if stack.spec.kv_layer is not None:
            return ()
        lead, convolution = (len(stack.layers), batch), stack.spec.convolution
        if convolution is not None:
            return State(jnp.zeros((*lead, convolution.taps - 1, stack.spec.hidden_size), dtype), None)
        mixer = stack.spec.delta or stack.spec.mamba
        if mixer is None:
            return None
        memory = jnp.zeros((*lead, *mixer.memory), jnp.float32)
        return State(jnp.zeros((*lead, mixer.taps - 1, mixer.channels), dtype), memory)

    return Cache(
        keys=nested(spec, functools.partial(zeros, "head_dim")),
        values=nested(spec, functools.partial(zeros, "value_dim")),
        states=nested(spec, state),
        reach=jnp.full((batch,), slots, jnp.int32) if reach is None else reach,
    )


def carries_state(spec: DecoderSpec) -> bool:
    """Whether a cache of this decoder has any State, so that it cannot be cut back to fewer tokens."""
    return any(stack.spec.carries for stack in stacks(spec))


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Puts new [layers, batch, kv_heads, T, d] into buffer [layers, batch, kv_heads, slots, d], each token at its
    position, int32 [batch, T]; not those of segment 0.
    """
    slots = jnp.where(segment_ids > 0, positions, buffer.shape[3])
    rows = jnp.arange(buffer.shape[1])[:, None]
    # Indexed dimensions come first: [batch, T, layers, kv_heads, d].
    return buffer.at[:, rows, :, slots].set(new.astype(buffer.dtype).transpose(1, 3, 0, 2, 4), mode="drop")
