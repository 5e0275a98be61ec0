"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): layers whose heads carry a state of fixed size along a row."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models.cache import State
from ftjax.models.delta import ShortConvolution, documents_of, gated_delta, inputs_after, last_inputs, of_heads
from ftjax.models.layers import ACTIVATIONS, Linear, remade
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import constrain


def state_space(
    x: jax.Array,
    steps: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    skip: jax.Array,
    documents: jax.Array,
    memory: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence of section 2 there with a scalar for each head's A: M <- e^(step a) M + step b x^T;
    out = c^T M + skip x.

    x [B, T, H, p]; steps, not negative, [B, T, H]; a, negative, and skip [H]; b and c [B, T, G, n], each of H / G heads
    in a row; memory [B, H, n, p]: all float32. documents: as of `gated_delta`. A token of step 0 leaves M as it is.

    Returns out [B, T, H, p] and M after the last token. It is linear attention with decays (section 5 there), and so
    what `gated_delta` computes in chunks, without its corrections.
    """
    out, memory = gated_delta(c, b, x, steps * a, steps, documents, memory, corrects=False)
    return out + skip[:, None] * x, memory


class Mamba2(nn.Module):
    """In the place of attention or beside it: a projection, a short causal convolution of each channel, `state_space`,
    a gate and a norm.

    Parameters: `in_proj` (to a gate, x, b, c and steps, in this order) and `out_proj`, `conv1d/weight` [channels, 1,
    taps] and `conv1d/bias` [channels], `A_log`, `D` and `dt_bias` [heads], `norm/scale` [heads * head_dim] if any.
    """

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, state, context):
        """As GatedDelta has it."""
        spec, mamba, dtypes = self.spec, self.spec.mamba, (self.dtype, self.param_dtype)
        batch, length, _ = x.shape
        real, documents = documents_of(state, context)
        wide, deep = mamba.heads * mamba.head_dim, mamba.groups * mamba.state_dim

        def linear(name, features, axes, bias):
            return Linear(features, axes, *dtypes, use_bias=bias, name=name)

        projected = linear("in_proj", wide + mamba.channels + mamba.heads, ("embed", "heads"), mamba.bias)(x)
        if any(factor != 1.0 for factor in spec.multipliers.mamba):
            factors = np.repeat(spec.multipliers.mamba, [wide, wide, deep, deep, mamba.heads])
            projected = projected * jnp.asarray(factors, projected.dtype)
        gate, mixed, steps = jnp.split(projected, [wide, wide + mamba.channels], axis=-1)
        inputs = inputs_after(state, jnp.where(real[..., None], mixed, 0), mamba.taps)
        mixed = ShortConvolution(mamba.taps, self.param_dtype, mamba.conv_bias, name="conv1d")(inputs, documents)
        mixed = ACTIVATIONS[spec.hidden_act](mixed)

        # Every device has whole rows, and its heads of them.
        def split(x, count):
            return constrain(x.reshape(batch, length, count, -1).astype(jnp.float32), "batch", None, "heads", None)

        x, b, c = jnp.split(mixed, [wide, wide + deep], axis=-1)
        x, b, c = split(x, mamba.heads), split(b, mamba.groups), split(c, mamba.groups)
        vector = functools.partial(of_heads, self, mamba.heads)
        a, skip = -jnp.exp(vector("A_log", _counted)), vector("D", nn.initializers.ones)
        steps = jax.nn.softplus(steps.astype(jnp.float32) + vector("dt_bias", nn.initializers.ones))
        steps = jnp.where(real[..., None], jnp.clip(steps, *mamba.limits), 0.0)
        memory = state.memory if state else jnp.zeros((batch, *mamba.memory), jnp.float32)
        out, memory = state_space(x, steps, a, b, c, skip, documents, memory)

        gated = Gated(mamba.norm, spec.norm_eps, mamba.groups, *dtypes, name="norm")
        out = gated(out.reshape(batch, length, wide), gate)
        out = linear("out_proj", spec.hidden_size, ("heads", "embed"), mamba.out_bias)(out)
        return out, None if state is None else State(last_inputs(inputs, real, documents, mamba.taps), memory)


class Gated(nn.Module):
    """x times silu(gate), under an RMS norm of each of `groups` equal parts, in float32, returned in `dtype`.

    norm: as of `spec.Mamba`; only with one there is a parameter, `scale`.
    """

    norm: str | None
    epsilon: float
    groups: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """x and gate [..., D] -> [..., D]"""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = None if self.norm is None else self.param("scale", init, (x.shape[-1],), self.param_dtype)

        def normed(x, scale):
            parts = x.reshape(*x.shape[:-1], self.groups, -1)
            parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + self.epsilon)
            return parts.reshape(x.shape) * scale.astype(jnp.float32)

        @remade
        def gated(x, gate, scale):
            x, gate = x.astype(jnp.float32), nn.silu(gate.astype(jnp.float32))
            if self.norm == "first":
                return (normed(x, scale) * gate).astype(self.dtype)
            return (normed(x * gate, scale) if self.norm else x * gate).astype(self.dtype)

        return gated(x, gate, scale)


def _counted(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """log 1, log 2, ...: an initializer."""
    return jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))
