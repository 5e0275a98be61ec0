"""Layers that carry a state of fixed size along a row, where others attend to all before: the gated delta rule, and
gated short convolutions.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.cache import State
from ftjax.models.layers import ACTIVATIONS, INIT, Linear, RMSNorm, remade
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import constrain

CHUNK = 64  # tokens whose products are taken together: more of them cost more, fewer make more steps


def gated_delta(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decays: jax.Array,
    rates: jax.Array,
    documents: jax.Array,
    memory: jax.Array,
    corrects: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Yang et al. 2024 (arXiv:2412.06464), equation 10: each head keeps a matrix M [k, v] from keys to values.

    A token multiplies M by exp(decay), moves what M has for its key a part `rate` of the way to its value, and reads M
    with its query: M <- e^decay M;  M <- M + rate k (v - k^T M)^T;  out = q^T M.

    queries, keys [B, T, G, k], each of H / G heads in a row; values [B, T, H, v]; decays (0 at most) and rates
    [B, T, H]; memory [B, H, k, v]: all float32. documents: int32 [B, T], never falling; M is zero where a token's
    differs from that of the token before, and `memory` is that of document 0. A token of decay and rate 0 leaves M as
    it is. corrects: whether a token takes away what M has for its key; without, M <- M + rate k v^T.

    Returns out [B, T, H, v] and M after the last token. Tokens of a chunk are taken together, as in section 3.3 there,
    and the backward pass makes a chunk's products again instead of keeping them.
    """
    (batch, length, groups, _), (*_, heads, width) = queries.shape, values.shape
    size = min(CHUNK, length)
    missing = -length % size
    shape = memory.shape

    def chunked(x: jax.Array, mode: str) -> jax.Array:  # [B, T, ...] -> [chunks, B, size, ...]
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def grouped(x: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [B, T, G, H / G, ...]
        return x.reshape(batch, length, groups, heads // groups, *x.shape[3:])

    shared = (x[:, :, :, None] for x in (queries, keys))
    tokens = tuple(chunked(x, "constant") for x in (*shared, *map(grouped, (values, decays, rates))))
    start = memory.reshape(batch, groups, heads // groups, *shape[2:]), jnp.zeros_like(documents[:, 0])
    body = jax.checkpoint(functools.partial(_chunk, corrects), prevent_cse=False)
    with jax.default_matmul_precision("high"):  # or TPUs would round to bfloat16 what is remembered for long
        (memory, _), out = jax.lax.scan(body, start, (*tokens, chunked(documents, "edge")))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, width)[:, :length], memory.reshape(shape)


def _chunk(corrects, carry, chunk):
    """The memory [B, G, R, k, v] and its document [B], and C tokens [B, C, ...]; -> both after them, and what they
    read. R heads have the queries and keys of their group, [B, C, G, 1, k].

    With U the steps that the tokens take, one in each row, and D[i, j] the decay from token j to i, 0 across documents:
    (I + rate K K^T D below the diagonal) U = rate (V - decayed K M), or U = rate V without corrections.
    """
    memory, document = carry
    *tokens, documents = chunk
    queries, keys, values, decays, rates = (jnp.moveaxis(x, 1, 3) for x in tokens)  # [B, G, R, C, ...]
    # In two parts, of which sums of the coarse one are exact: differences of sums of strong decays would be far off.
    coarse = jax.lax.stop_gradient(jnp.round(decays * 256) / 256)
    coarse, fine = jnp.cumsum(coarse, axis=-1), jnp.cumsum(decays - coarse, axis=-1)
    size = decays.shape[-1]
    same = (documents[:, :, None] == documents[:, None, :]) & jnp.tri(size, dtype=bool)
    between = sum(part[..., :, None] - part[..., None, :] for part in (coarse, fine))
    between = jnp.exp(jnp.where(same[:, None, None], between, -jnp.inf))
    since = jnp.where((documents == document[:, None])[:, None, None], jnp.exp(coarse + fine), 0.0)[..., None]

    steps = rates[..., None] * (values - since * (keys @ memory) if corrects else values)
    if corrects and size > 1:
        mixed = rates[..., None] * (keys @ keys.mT) * between
        solve = functools.partial(jax.lax.linalg.triangular_solve, left_side=True, lower=True, unit_diagonal=True)
        steps = solve(mixed, steps)
    out = since * (queries @ memory) + ((queries @ keys.mT) * between) @ steps
    # What is left of the memory at the end, and of the step of each token.
    memory = since[..., -1:, :] * memory + keys.mT @ (between[..., -1, :, None] * steps)
    return (memory, documents[:, -1]), jnp.moveaxis(out, 3, 1)


class GatedDelta(nn.Module):
    """In the place of attention: projections, a short causal convolution of each channel, `gated_delta`, a gated norm.

    Parameters: projections (of one name or the other, see `spec.Delta.fused`) and `out_proj`, `conv1d/weight`
    [channels, 1, taps], `A_log` and `dt_bias` [value heads], `norm/scale` [value_dim].
    """

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, state, context):
        """x [B, T, D] -> [B, T, D], and the State after these tokens unless state is None.

        state: of the tokens before, () where there are none. With one a row goes on, or begins anew at position 0.
        Documents are the segments of `context`; its padding, segment 0, changes nothing.
        """
        spec, delta = self.spec, self.spec.delta
        batch, length, _ = x.shape
        real, documents = documents_of(state, context)
        mixed, gate, rates, steps = self._project(x)
        inputs = inputs_after(state, jnp.where(real[..., None], mixed, 0), delta.taps)
        mixed = ShortConvolution(delta.taps, self.param_dtype, name="conv1d")(inputs, documents)
        mixed = ACTIVATIONS[spec.hidden_act](mixed)

        # Every device has whole rows, and its heads of them.
        def heads(x, count):
            return constrain(x.reshape(batch, length, count, -1).astype(jnp.float32), "batch", None, "heads", None)

        wide = delta.key_heads * delta.key_dim
        queries, keys, values = jnp.split(mixed, [wide, 2 * wide], axis=-1)
        queries, keys = (_unit(heads(x, delta.key_heads)) for x in (queries, keys))
        vector = functools.partial(of_heads, self, delta.value_heads)
        decays = -jnp.exp(vector("A_log", nn.initializers.zeros)) * jax.nn.softplus(
            steps.astype(jnp.float32) + vector("dt_bias", nn.initializers.ones)
        )
        decays, rates = (jnp.where(real[..., None], x, 0.0) for x in (decays, nn.sigmoid(rates.astype(jnp.float32))))
        memory = state.memory if state else jnp.zeros((batch, *delta.memory), jnp.float32)
        queries, values = queries * delta.key_dim**-0.5, heads(values, delta.value_heads)
        out, memory = gated_delta(queries, keys, values, decays, rates, documents, memory)

        out = RMSNorm(spec.norm_eps, self.dtype, self.param_dtype, name="norm")(out.astype(self.dtype))
        gate = gate.reshape(out.shape).astype(jnp.float32)
        out = (out * nn.silu(gate)).astype(self.dtype).reshape(batch, length, -1)
        out = Linear(spec.hidden_size, ("heads", "embed"), self.dtype, self.param_dtype, name="out_proj")(out)
        return out, None if state is None else State(last_inputs(inputs, real, documents, delta.taps), memory)

    def _project(self, x):
        """[B, T, ...]: queries, keys and values beside each other, each by heads; the gate; rates and steps, before
        their functions.
        """
        delta, lead = self.spec.delta, x.shape[:-1]
        wide, deep = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim

        def linear(name, features):
            return Linear(features, ("embed", "heads"), self.dtype, self.param_dtype, name=name)(x)

        if not delta.fused:
            mixed, gate = linear("in_proj_qkv", 2 * wide + deep), linear("in_proj_z", deep)
            return mixed, gate, linear("in_proj_b", delta.value_heads), linear("in_proj_a", delta.value_heads)
        # By heads of keys: of each its query, its key, and the values and gates of its group.
        group = delta.value_heads // delta.key_heads
        ends = [delta.key_dim, 2 * delta.key_dim, 2 * delta.key_dim + group * delta.value_dim]
        fused = linear("in_proj_qkvz", 2 * (wide + deep)).reshape(*lead, delta.key_heads, -1)
        queries, keys, values, gate = (part.reshape(*lead, -1) for part in jnp.split(fused, ends, axis=-1))
        both = linear("in_proj_ba", 2 * delta.value_heads).reshape(*lead, delta.key_heads, -1)
        rates, steps = (part.reshape(*lead, -1) for part in jnp.split(both, 2, axis=-1))
        return jnp.concatenate([queries, keys, values], axis=-1), gate, rates, steps


class GatedConvolution(nn.Module):
    """In the place of attention (LFM2 Technical Report, Liquid AI 2025): of each token's projection into three, the
    first times the third goes through a short causal convolution of each channel, and times the second comes out.

    Parameters: `in_proj` and `out_proj`, `conv/weight` [D, 1, taps], with a bias `conv/bias` [D].
    """

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, state, context):
        """As GatedDelta has it."""
        width, taps, bias = self.spec.hidden_size, self.spec.convolution.taps, self.spec.convolution.bias
        dtypes = self.dtype, self.param_dtype
        real, documents = documents_of(state, context)
        into = Linear(3 * width, ("embed", "heads"), *dtypes, use_bias=bias, name="in_proj")
        first, second, third = jnp.split(into(x), 3, axis=-1)
        inputs = inputs_after(state, jnp.where(real[..., None], first * third, 0), taps)
        out = second * ShortConvolution(taps, self.param_dtype, bias, name="conv")(inputs, documents)
        out = Linear(width, ("heads", "embed"), *dtypes, use_bias=bias, name="out_proj")(out)
        return out, None if state is None else State(last_inputs(inputs, real, documents, taps), None)


class ShortConvolution(nn.Module):
    """Each channel of a token is a weighted sum of its last `taps` values, those of its own document; `weight`
    [channels, 1, taps], the present token's last, and `bias` [channels] where there is one.
    """

    taps: int
    param_dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, documents: jax.Array) -> jax.Array:
        """inputs [B, taps - 1 + T, C], the first of them of document 0; documents int32 [B, T] -> [B, T, C]"""
        init, channels = nn.with_logical_partitioning(INIT, ("heads", None, None)), inputs.shape[-1]
        weight = self.param("weight", init, (channels, 1, self.taps), self.param_dtype)
        length = documents.shape[1]
        owners = jnp.pad(documents, [(0, 0), (self.taps - 1, 0)])

        @remade
        def summed(inputs, weight):
            parts = []
            for tap in range(self.taps):
                part, owner = inputs[:, tap : tap + length], owners[:, tap : tap + length]
                parts.append(jnp.where((owner == documents)[..., None], part, 0) * weight[:, 0, tap])
            return sum(parts)

        out = summed(inputs, weight.astype(inputs.dtype))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
            out = out + self.param("bias", init, (channels,), self.param_dtype).astype(out.dtype)
        return out


def of_heads(module: nn.Module, heads: int, name: str, init: nn.initializers.Initializer) -> jax.Array:
    """The parameter `name` of a module, a number for each head: float32 [heads]."""
    init = nn.with_logical_partitioning(init, ("heads",))
    return module.param(name, init, (heads,), module.param_dtype).astype(jnp.float32)


def documents_of(state, context):
    """Which tokens are no padding, bool [B, T], and of which document each is, int32 [B, T] as `gated_delta` has it.

    0 is what goes on from `state`, or padding before the first document of a row without one.
    """
    real = context.segment_ids > 0
    if state:
        begins = real & (context.positions == 0)
    else:
        before = jnp.pad(context.segment_ids[:, :-1], [(0, 0), (1, 0)])
        begins = real & (context.segment_ids != before)
    return real, jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def inputs_after(state, new, taps):
    """new [B, T, C] after what the state has of the tokens before, or zeros: [B, taps - 1 + T, C]"""
    batch, _, channels = new.shape
    earlier = state.inputs if state else jnp.zeros((batch, taps - 1, channels), new.dtype)
    return jnp.concatenate([earlier.astype(new.dtype), new], axis=1)


def last_inputs(inputs, real, documents, taps):
    """What the next tokens' state has of `inputs_after`: the last of this document that were no padding, which is on
    the right then.
    """
    owners = jnp.pad(documents, [(0, 0), (taps - 1, 0)])
    inputs = jnp.where((owners == documents[:, -1:])[..., None], inputs, 0)
    places = real.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(taps - 1)
    return jnp.take_along_axis(inputs, places[..., None], axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """Along the last axis of length 1."""
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)
