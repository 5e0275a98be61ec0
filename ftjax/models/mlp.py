"""What stands between two attentions: the gated or plain MLP, and the mixture of experts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax import quant
from ftjax.models.grouped import grouped_matmul
from ftjax.models.layers import ACTIVATIONS, INIT, Linear, Xielu, packed_kernel, remade, scaled
from ftjax.models.routing import note, route
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import constrain, partition_spec, platform

GATES = {None: ("up_proj",), "separate": ("gate_proj", "up_proj")}  # kernels before the activation; else one of both
PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")  # by which their dropout differs


class MLP(nn.Module):
    """SwiGLU and its kin (Shazeer 2020), or the plain MLP of GPT-2.

    block: how many tokens of each row go through at a time, None for all. The inner activations are the widest there
    are; with blocks the backward pass holds those of one block only.
    """

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    block: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] in `dtype` -> [B, T, D]"""
        rows, length, _ = x.shape
        token_index = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)
        # The key of the dropout is drawn here, outside the loop, because flax would give a loop's body another one:
        # the same tokens would be dropped only where the rows are cut alike.
        rng = self.make_rng("dropout") if self.has_rng("dropout") else None
        if not self._in_blocks(length):
            return self._project(x, token_index, rng)

        def over_blocks(mlp, *blocks):
            body = nn.remat(lambda mlp, _, x, index: (None, mlp._project(x, index, rng)), prevent_cse=False)
            shared = {"variable_broadcast": ("params", "lora"), "split_rngs": {"params": False, "dropout": False}}
            return nn.scan(body, **shared, in_axes=1, out_axes=1)(mlp, None, *blocks)[1]

        blocks = (each.reshape(rows, -1, self.block, *each.shape[2:]) for each in (x, token_index))
        # A kernel that is split over devices is gathered here, once; inside the loop it would be for every block.
        out = nn.map_variables(over_blocks, "params", self._gathered)(self, *blocks)
        return out.reshape(x.shape)

    def _in_blocks(self, length: int) -> bool:
        """Whether rows of `length` tokens go through in blocks: where these divide them, and cost no time beside."""
        if self.block is None or length <= self.block or length % self.block:
            return False
        # Quantized kernels would be made whole, and DoRA's norms computed, in each block again.
        adapters = self.variables.get("lora", {}).values()
        if "quant" in self.variables or any("lora_magnitude" in adapter for adapter in adapters):
            return False
        # A block of a row that is split over devices would be on some of them, and the others would wait.
        mesh = jax.sharding.get_abstract_mesh()
        return mesh.empty or partition_spec(("length",), (length,), mesh)[0] is None

    def _project(self, x: jax.Array, token_index: jax.Array, rng: jax.Array | None) -> jax.Array:
        """x [B, T, D] in `dtype`; token_index int32 [B, T], of each token in the whole batch; rng a PRNG key.

        Returns [B, T, D]. With index and key an adapter's dropout is the same in blocks as all at once.
        """
        spec = self.spec

        def linear(name, features, axes, x):
            layer = Linear(features, axes, self.dtype, self.param_dtype, use_bias=spec.mlp_bias, name=name)
            # Without a key of its own each projection would drop the same inputs as the others.
            own = None if rng is None else jax.random.fold_in(rng, PROJECTIONS.index(name))
            return layer(x, token_index, own)

        def down(_, scalars, *projected):
            inner = remade(functools.partial(_activated, spec))(scalars, *projected)
            return linear("down_proj", spec.hidden_size, ("mlp", "embed"), inner)

        scalars = Xielu(self.param_dtype, name="act_fn")() if spec.hidden_act == "xielu" else ()
        projected = _projected(spec, lambda name, features: linear(name, features, ("embed", "mlp"), x))
        # What the activations leave is made again on CPUs, too: 15 % of a step's memory, for no time. TPUs would move
        # four tenths more to and from theirs.
        on_cpus = platform(jax.sharding.get_abstract_mesh()) == "cpu"
        out = (nn.remat(down, prevent_cse=False) if on_cpus else down)(self, scalars, *projected)
        return scaled(out, spec.multipliers.down)

    def _gathered(self, variables):
        """The kernels as products use them: in `dtype`, whole along the model's width."""

        def gathered(path, leaf):
            *_, module, name = (key.key for key in path)
            axes = ("mlp", "width") if module == "down_proj" else ("width", "mlp")
            return constrain(leaf.astype(self.dtype), *axes) if name == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(gathered, variables)


class Mixture(nn.Module):
    """Each token's MLP is a weighted sum of a few experts' (Shazeer et al. 2017; no token is ever dropped)."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """x [B, T, D] in `dtype`, segment_ids int32 [B, T] -> [B, T, D]"""
        spec, experts, dtypes = self.spec, self.spec.experts, (self.dtype, self.param_dtype)
        axes, bias = ("embed", None), experts.bias
        # Its logits stay in float32: rounded to bfloat16, experts of nearly the same score would change places.
        router = Linear(experts.count, axes, *dtypes, out_dtype=jnp.float32, use_bias=bias, name="router")
        correction = None
        if experts.correction:  # in float32, as its files have it: in bfloat16 experts would change places
            shape = (1, experts.count) if experts.correction_row else (experts.count,)
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None,) * len(shape))
            correction = self.param("correction", init, shape, jnp.float32)
        logits = router(x)
        weights, chosen = route(logits, experts, correction)
        note(self, logits, chosen, experts, segment_ids)
        out = Experts(spec, *dtypes, name="experts")(x, weights, chosen)
        if experts.shared is None:
            return out
        alone = dataclasses.replace(spec, intermediate_size=experts.shared, experts=None)
        shared = MLP(alone, *dtypes, name="shared_expert")(x)
        if experts.shared_gate:
            shared = shared * nn.sigmoid(Linear(1, axes, *dtypes, name="shared_expert_gate")(x))
        return out + shared


class Experts(nn.Module):
    """The experts' MLPs, stacked. Parameters: NAME/kernel [experts, in, out] and NAME/bias [experts, out]."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [B, T, D] in `dtype`; weights float32 and chosen int32 [B, T, per_token] -> [B, T, D]."""
        count = self.spec.experts.count
        spec = dataclasses.replace(self.spec, gate=self.spec.experts.gate or self.spec.gate)
        hidden, inner = spec.hidden_size, spec.intermediate_size
        if spec.gate in GATES:
            sizes = dict.fromkeys(GATES[spec.gate], (hidden, inner))
        else:
            sizes = {"gate_up_proj": (hidden, 2 * inner)}
        sizes["down_proj"] = (inner, hidden)
        stacks, axes = {}, {}
        for name, shape in sizes.items():
            own = ("mlp", "embed") if name == "down_proj" else ("embed", "mlp")
            stack = Stack(count, *shape, own, self.dtype, self.param_dtype, spec.experts.bias, name=name)
            stacks[name] = stack()
            # Whole along the model's width when they are used, as a kernel split over fsdp always is.
            used = ("experts", *(None if axis == "embed" else axis for axis in own))
            axes[name] = {
                "kernel": used,
                "bias": (used[0], used[2]),
                "lora_a": (used[0], used[1], None),
                "lora_b": (used[0], None, used[2]),
            }
        if not any(quant.is_packed(stack) for stack in stacks.values()):
            return _over_mesh(spec, x, weights, chosen, stacks, axes)

        # The backward pass makes quantized kernels whole once more instead of keeping them: in bfloat16 they take two
        # (int8) or four times (NF4) what they do packed, and they are most of the model.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def dequantized(x, weights, stacks):
            whole = {name: _whole(stack, self.dtype) for name, stack in stacks.items()}
            return _over_mesh(spec, x, weights, chosen, whole, axes)

        return dequantized(x, weights, stacks)


class Stack(nn.Module):
    """The same linear layer of every expert; only holds the parameters `kernel` [experts, in, out] and `bias`.

    A quantized kernel comes out as its arrays, an adapter as `lora_a` [experts, in, r] and `lora_b` [experts, r, out],
    the latter times its scale.
    """

    experts: int
    rows: int
    columns: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_bias: bool

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        init = nn.with_logical_partitioning(INIT, ("experts", *self.axes))
        shape = (self.experts, self.rows, self.columns)
        out = packed_kernel(self) or {"kernel": self.param("kernel", init, shape, self.param_dtype).astype(self.dtype)}
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("experts", self.axes[1]))
            bias = self.param("bias", init, (self.experts, self.columns), self.param_dtype)
            out["bias"] = bias.astype(self.dtype)
        if lora := self.variables.get("lora"):
            out["lora_a"] = lora["lora_a"].astype(self.dtype)
            out["lora_b"] = (lora["lora_b"] * lora["lora_scale"][:, None, None]).astype(self.dtype)
        return out


def _whole(stack: dict[str, jax.Array], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """What Stack gave, with a kernel [experts, in, out] in `dtype` for its packed arrays."""
    if not quant.is_packed(stack):
        return stack
    others = {name: stack[name] for name in ("bias", "lora_a", "lora_b") if name in stack}
    packed = {name: array for name, array in stack.items() if name not in others}
    return {"kernel": quant.dequantize(packed, dtype)} | others


def _over_mesh(
    spec: DecoderSpec,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    stacks: dict[str, dict[str, jax.Array]],
    axes: dict[str, dict[str, tuple[str | None, ...]]],
) -> jax.Array:
    """`_mixture` on each device's own experts and columns, of the tokens that share them, and the sum.

    x [B, T, D]; weights float32 and chosen int32 [B, T, per_token]; stacks: {projection: {array's name: array}}, of all
    experts, none packed; axes: the logical axes of each of these arrays. Returns [B, T, D] in x's dtype.

    Devices along `expert` hold different tokens and different experts. Each gets all their tokens and returns its share
    of each to the token's owner: a gather and a scattered sum. That drops no token, and moves no more than an exchange
    of the chosen tokens alone would where a token has about as many experts as there are devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _mixture(spec, x, weights, chosen, stacks)
    tokens = partition_spec(("batch", "length", "width"), x.shape, mesh)
    placed = {
        name: {leaf: partition_spec(axes[name][leaf], array.shape, mesh) for leaf, array in stack.items()}
        for name, stack in stacks.items()
    }
    if spec.gate == "halves" and placed["gate_up_proj"]["kernel"][2]:
        # A device's columns of the one kernel would be the gate's alone, or the other half's: it gets its own of both.
        apart = dataclasses.replace(spec, gate="separate")
        return _over_mesh(apart, x, weights, chosen, _apart(stacks), _apart(axes))
    # Mesh axes, None where nothing is split: of the experts, and of the columns inside each (the rows of down_proj).
    expert_axis, column_axis, _ = placed["down_proj"]["kernel"]
    rows = tokens[0] if isinstance(tokens[0], tuple) else (tokens[0],)
    # Where the devices of `expert` have the same tokens (too few rows to split), sums alone put the shares together.
    exchanged = expert_axis if expert_axis in rows else None
    summed = tuple(axis for axis in (expert_axis, column_axis) if axis and axis != exchanged)

    def local(x, weights, chosen, stacks):
        if exchanged:
            x, weights, chosen = (jax.lax.all_gather(each, exchanged, tiled=True) for each in (x, weights, chosen))
        here = stacks["down_proj"]["kernel"].shape[0]  # experts on this device
        first = jax.lax.axis_index(expert_axis) * here if expert_axis else 0
        if column_axis and "bias" in stacks["down_proj"]:  # which every part of the columns would add
            alone = jax.lax.axis_index(column_axis) == 0
            stacks = stacks | {"down_proj": stacks["down_proj"] | {"bias": stacks["down_proj"]["bias"] * alone}}
        out = _mixture(spec, x, weights, chosen - first, stacks)
        if exchanged:
            out = jax.lax.psum_scatter(out, exchanged, tiled=True)
        return jax.lax.psum(out, summed) if summed else out

    inputs = (tokens, tokens, tokens, placed)
    return jax.shard_map(local, in_specs=inputs, out_specs=tokens, check_vma=False)(x, weights, chosen, stacks)


def _apart(projections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stacks or axes, as `_over_mesh` has them, with a projection for each half of gate_up_proj in its place."""
    both, halves = projections["gate_up_proj"], ({}, {})
    for leaf, value in both.items():
        whole = leaf == "lora_a" or isinstance(value, tuple)
        for half, part in zip(halves, (value, value) if whole else jnp.split(value, 2, axis=-1)):
            half[leaf] = part
    others = {name: its for name, its in projections.items() if name != "gate_up_proj"}
    return others | dict(zip(("gate_proj", "up_proj"), halves))


def _mixture(
    spec: DecoderSpec, x: jax.Array, weights: jax.Array, chosen: jax.Array, stacks: dict[str, dict[str, jax.Array]]
) -> jax.Array:
    """The share of these experts in the mixture; `chosen` counts from the first of them, others are outside 0 .. n - 1.

    x [B, T, D]; weights float32 and chosen int32 [B, T, per_token]; stacks as in `_over_mesh`, n experts in each.
    Returns [B, T, D] in x's dtype.

    Tokens are sorted by expert, so that each expert multiplies blocks of its own rows: as many products as tokens have
    experts, with shapes that do not depend on what the router says, and without a capacity that could be exceeded.
    """
    count, per_token = stacks["down_proj"]["kernel"].shape[0], chosen.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    owners = chosen.reshape(-1)  # [B * T * per_token]: a token is there once for each of its experts
    owners = jnp.where((owners >= 0) & (owners < count), owners, count)  # the others come last, and no expert has them
    order = jnp.argsort(owners, stable=True)
    rows, owners, weights = flat[order // per_token], owners[order], weights.astype(x.dtype)
    if spec.experts.weigh_input:
        rows, weights = rows * weights.reshape(-1)[order][:, None], jnp.ones_like(weights)
    sizes = jnp.bincount(owners, length=count + 1)[:count].astype(jnp.int32)  # rows of each expert

    def project(name: str, rows: jax.Array) -> jax.Array:
        """rows [B * T * per_token, in], sorted -> [B * T * per_token, out]"""
        stack = stacks[name]
        out = grouped_matmul(rows, stack["kernel"], sizes)
        if "lora_a" in stack:
            out = out + grouped_matmul(grouped_matmul(rows, stack["lora_a"], sizes), stack["lora_b"], sizes)
        return out + stack["bias"][owners] if "bias" in stack else out

    projected = _projected(spec, lambda name, _: project(name, rows))
    out = project("down_proj", remade(functools.partial(_activated, spec))((), *projected))
    # Rows of no expert here may hold anything after the products. The second sort is the inverse of the first.
    out = jnp.where(owners[:, None] < count, out, 0)[jnp.argsort(order)]
    out = out.reshape(flat.shape[0], per_token, -1)
    return jnp.einsum("nkd,nk->nd", out, weights.reshape(-1, per_token)).reshape(x.shape)


def _projected(spec: DecoderSpec, project: Callable[[str, int], jax.Array]) -> list[jax.Array]:
    """What activations are made of: [..., features] each, in the dtype that `project` gives.

    project(name, features) makes and applies one projection of the layer's input: [..., features].
    """
    features = spec.intermediate_size
    if spec.gate in GATES:
        return [project(name, features) for name in GATES[spec.gate]]
    return [project("gate_up_proj", 2 * features)]


def _activated(spec: DecoderSpec, scalars: tuple[jax.Array, ...], *projected: jax.Array) -> jax.Array:
    """The activations between the two projections, [..., intermediate_size].

    scalars: of the activation, where it has any; projected: what `_projected` returns.
    """

    def activation(x):
        return ACTIVATIONS[spec.hidden_act](x, *scalars)

    if spec.gate is None:
        return activation(*projected)
    if spec.gate == "separate":
        gate, up = projected
    else:
        (both,) = projected
        gate, up = jnp.split(both, 2, axis=-1) if spec.gate == "halves" else (both[..., ::2], both[..., 1::2])
    gate = scaled(gate, spec.multipliers.gate)
    if spec.gate_cutoff is not None:
        gate = _above(gate, spec.gate_cutoff)
    if spec.swiglu_clamp is None:
        return activation(gate) * up
    alpha, limit = spec.swiglu_clamp  # GPT-OSS: values beyond the limit are cut, and the linear part is shifted by one
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _above(gate: jax.Array, cutoff: float) -> jax.Array:
    """By how much values [..., features] are beyond `cutoff` deviations above their mean, else 0 (Gemma 3n)."""
    wide = gate.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    # A root has no gradient at 0, which is what the MLP gets where a token's embedding is 0.
    return nn.relu(wide - mean - cutoff * jnp.sqrt(jnp.maximum(variance, 1e-30))).astype(gate.dtype)
