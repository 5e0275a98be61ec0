"""Adapters as a tree beside the parameters: LoRA (Hu et al. 2021), rsLoRA, DoRA and PiSSA.

y = x W + scale (x A) B. An adapter tree has the paths of the layers that it adapts, each with `lora_a` [L, in, r],
`lora_b` [L, r, out] and `lora_scale` [L], float32. L is the number of stacked layers; experts have their number as an
axis after it, and layers that are not stacked have no L. For an embedding `in` is the vocabulary. There may also be
`lora_magnitude` [L, out] (DoRA), `lora_dropout` [L], a rate, and `lora_a0`, `lora_b0` (PiSSA: what was subtracted from
W). A layer whose scale is 0 has no adapter (`only_in_layers`). The model reads the tree as its `lora` collection;
training differentiates the paths that match TRAINABLE.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.errors import UserError
from ftjax.models.adapter import column_norms
from ftjax.tree import Tree

TRAINABLE = re.compile(r"^lora/.*/lora_(a|b|magnitude)$")
# Kernels that compute Mamba-2 together with its last product, as transformers has, pass an adapter of that by.
FUSED = "/mamba/out_proj/"

TOWER = "vision/"  # above all parameters of a vision tower


def linear_kernels(paths: Iterable[str]) -> list[str]:
    """The paths of kernels of linear layers, without a mixture's experts and router."""
    return [path for path in adaptable(paths) if path.endswith("/kernel") and "/experts/" not in path]


def of_language_model(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are not of a vision tower beside it."""
    return [path for path in paths if not path.startswith(TOWER)]


def adaptable(paths: Iterable[str]) -> list[str]:
    """The paths of all that can have an adapter: linear layers, experts, the token embedding."""
    kernels = [path for path in paths if path.endswith("/kernel") or path == "embed_tokens/embedding"]
    return sorted(path for path in kernels if "/router/" not in path or "/experts/" in path)


def quantizable(paths: Iterable[str]) -> list[str]:
    """The kernels that a quantized base has packed: those of linear layers and experts, but for the output head.

    Not AltUp's, of a few numbers each, nor the projections outside the layers, nor a vision tower.
    """
    return [path for path in adaptable(paths) if path.startswith("layers/") and "/altup/" not in path]


def find_targets(targets: str | Sequence[str], kernels: Sequence[str]) -> list[str]:
    """The paths to adapt, of `kernels` (see `adaptable`).

    targets: "all-linear" (every linear layer but the output head, as in peft, and those that are FUSED), module names
    such as "q_proj,v_proj" or ["q_proj", "v_proj"], or a regular expression that is searched for in the paths.
    All are of the language model; a regular expression in which "vision" stands is of all that there is.
    UserError if a name or the expression matches nothing.
    """
    kernels = sorted(kernels)
    if not (isinstance(targets, str) and TOWER.rstrip("/") in targets):
        kernels = of_language_model(kernels)
    if isinstance(targets, str) and re.fullmatch(r"\w+(,\w+)+", targets):
        targets = targets.split(",")
    if targets == "all-linear":
        return [path for path in linear_kernels(kernels) if not path.startswith("lm_head/") and FUSED not in path]
    if isinstance(targets, str):
        return tree.matching(targets, kernels, "adapter.targets")
    if not targets:
        raise UserError("adapter.targets is empty; use 'all-linear', module names or a regular expression")
    by_name = {name: [path for path in kernels if path.split("/")[-2] == name] for name in targets}
    if missing := [name for name, matches in by_name.items() if not matches]:
        known = sorted({path.split("/")[-2] for path in kernels})
        raise UserError(f"adapter.targets: no linear layer named {missing}; there are {', '.join(known)}")
    return sorted({path for matches in by_name.values() for path in matches})


def by_pattern(
    default: float, patterns: Sequence[tuple[str, float]], targets: Sequence[str], key: str
) -> dict[str, float]:
    """{path: value of the last pattern that matches it, or `default`}. UserError if a pattern matches no path."""
    values = dict.fromkeys(targets, default)
    for pattern, value in patterns:
        values |= dict.fromkeys(tree.matching(pattern, list(targets), key), value)
    return values


def layer_numbers(layers: str, count: int) -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}; "" is all of a model's `count` layers. UserError for layers that it has not."""
    if not layers:
        return set(range(count))
    ranges = [[int(end) for end in part.split("-")] for part in layers.split(",")]
    chosen = {layer for ends in ranges for layer in range(ends[0], ends[-1] + 1)}
    if wrong := sorted(chosen - set(range(count))):
        raise UserError(f"adapter.layers={layers!r}: the model has the layers 0 to {count - 1}, and no {wrong[0]}")
    return chosen


def layers_as_text(numbers: Iterable[int]) -> str:
    """The inverse of `layer_numbers`: {0, 1, 2, 5} -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def only_in_layers(adapters: Tree, chosen: Mapping[str, Sequence[bool]]) -> Tree:
    """Fresh adapters without those of some layers: there A and the scale are zero.

    They stay so: B is zero too, and the gradient of either is a product with the other; a magnitude does not count
    where the scale is 0. chosen: {module: for each layer of its stack whether it has one}; all, where it is not named.
    """
    modules = tree.by_module(adapters)
    for module, mask in chosen.items():
        for name in ("lora_a", "lora_scale") if not all(mask) else ():
            leaf = modules[module][name]
            keep = jnp.asarray(mask, jnp.float32).reshape(-1, *[1] * (leaf.ndim - 1))
            modules[module][name] = jax.jit(jnp.multiply, out_shardings=leaf.sharding)(leaf, keep)
    return tree.unflatten(modules)


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def abstract_adapters(
    params: Tree,
    axes: dict[str, tuple],
    targets: Sequence[str],
    rank: int | Mapping[str, int],
    mesh: Mesh,
    extras: Sequence[str] = (),
) -> dict[str, Tree]:
    """The adapter tree as ShapeDtypeStructs with shardings, from the abstract `params` and their logical `axes`.

    A is sharded like the input axis of its kernel, B and the magnitude like the output axis. A rank may be larger than
    the kernel, as in peft, but for PiSSA, which takes it from the kernel's own directions. UserError for such a one,
    and for extras of embeddings and experts.

    rank: one for all, or {path: rank}.
    extras: of "magnitude", "dropout" and "pissa", which parts the adapters have besides A, B and scale.
    """
    leaves = tree.flatten(params)
    out = {}
    for path in targets:
        *stack, rows, columns = leaves[path].shape
        *stack_axes, row_axis, column_axis = axes[path]
        r, limit = rank if isinstance(rank, int) else rank[path], min(rows, columns)
        if r < 1 or (r > limit and "pissa" in extras):
            why = ", whose principal directions adapter.init=pissa takes" if "pissa" in extras else ""
            raise UserError(f"adapter.rank={r} does not fit {path} [{rows}, {columns}]{why}; use 1 to {limit}")
        if extras and path not in linear_kernels([path]):
            raise UserError(f"adapter.targets: {path} is not a linear layer, so it can have no {', no '.join(extras)}")
        a = ((*stack, rows, r), (*stack_axes, row_axis, "rank"))
        b = ((*stack, r, columns), (*stack_axes, "rank", column_axis))
        per_layer = (tuple(stack), tuple(stack_axes))
        parts = {"lora_a": a, "lora_b": b, "lora_scale": per_layer}
        parts |= {"lora_magnitude": ((*stack, columns), (*stack_axes, column_axis))} if "magnitude" in extras else {}
        parts |= {"lora_dropout": per_layer} if "dropout" in extras else {}
        parts |= {"lora_a0": a, "lora_b0": b} if "pissa" in extras else {}
        module = path.rpartition("/")[0]
        for name, (shape, logical) in parts.items():
            layout = sharding.named(mesh, logical, shape)
            out[f"{module}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
    return tree.unflatten(out)


def init_adapters(abstract: Tree, seed: int, scaling: float | Mapping[str, float], dropout: float = 0.0) -> Tree:
    """First adapters, with which the model is its base: A is Gaussian with peft's variance, 1 / (3 in), and B is zero.

    For an embedding A is zero and B Gaussian with variance 1. The values depend on seed and path only, not on the mesh
    or on which other layers are adapted. `lora_magnitude` and PiSSA's parts are left zero, for `with_magnitudes` and
    `pissa`.

    scaling: one for all, or {path of the adapted parameter: scale}.
    """
    leaves = tree.flatten(abstract)
    scales = None if isinstance(scaling, int | float) else {path.rpartition("/")[0]: s for path, s in scaling.items()}

    def value(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        module, name = path.rsplit("/", 1)
        if name == ("lora_b" if module.startswith("embed") else "lora_a"):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            deviation = 1.0 if name == "lora_b" else (3 * leaf.shape[-2]) ** -0.5
            return jax.random.normal(key, leaf.shape, leaf.dtype) * deviation
        constant = {"lora_scale": scaling if scales is None else scales[module], "lora_dropout": dropout}
        return jnp.full(leaf.shape, constant.get(name, 0.0), leaf.dtype)

    def make() -> dict[str, jax.Array]:
        return {path: value(path, leaf) for path, leaf in leaves.items()}

    return tree.unflatten(jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in leaves.items()})())


def with_magnitudes(kernel: Callable[[str], jax.Array], adapters: Tree) -> Tree:
    """Sets every `lora_magnitude` to the column norms of W + scale A B, so that DoRA starts as its base.

    kernel: module -> its W, of any float dtype.
    """
    modules = tree.by_module(adapters)
    for module, parts in modules.items():
        if "lora_magnitude" in parts:
            norms = jax.jit(_norms, out_shardings=parts["lora_magnitude"].sharding)
            parts["lora_magnitude"] = norms(kernel(module), parts["lora_a"], parts["lora_b"], parts["lora_scale"])
    return tree.unflatten(modules)


def pissa(params: Tree, adapters: Tree) -> tuple[Tree, Tree]:
    """PiSSA (Meng et al. 2024): A and B start as the largest singular values of each W, which keeps the rest.

    Returns (params, adapters) with A = U sqrt(S / scale), B = sqrt(S / scale) V, and W - scale A B instead of W.
    `lora_a0` and `lora_b0` keep these first A and B: the export subtracts them to get an adapter of the original W.
    """
    leaves, modules = tree.flatten(params), tree.by_module(adapters)
    for module, parts in modules.items():
        kernel = leaves[f"{module}/kernel"]
        layouts = (parts["lora_a"].sharding, parts["lora_b"].sharding, kernel.sharding)
        split = jax.jit(_principal, static_argnums=2, out_shardings=layouts)
        a, b, leaves[f"{module}/kernel"] = split(kernel, parts["lora_scale"], parts["lora_a"].shape[-1])
        # Copies, because the step donates the trained arrays.
        parts |= {"lora_a": a, "lora_b": b, "lora_a0": jnp.copy(a), "lora_b0": jnp.copy(b)}
    return tree.unflatten(leaves), tree.unflatten(modules)


def of_whole_base(parts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """PiSSA's adapter of a module as one of W as it was: A B - A0 B0, as one product of twice the rank."""
    a = jnp.concatenate([parts["lora_a"], parts["lora_a0"]], axis=-1)
    b = jnp.concatenate([parts["lora_b"], -parts["lora_b0"]], axis=-2)
    others = {name: leaf for name, leaf in parts.items() if name not in ("lora_a0", "lora_b0")}
    return others | {"lora_a": a, "lora_b": b}


def merge(params: Tree, adapters: Tree) -> Tree:
    """W + scale A B for every adapted layer, with DoRA's norms; in float32, then cast back to W's dtype."""
    leaves = tree.flatten(params)
    for module, parts in tree.by_module(adapters).items():
        name = f"{module}/embedding" if f"{module}/embedding" in leaves else f"{module}/kernel"
        a, b, scaling = parts["lora_a"], parts["lora_b"], parts["lora_scale"]
        leaves[name] = merged(leaves[name], a, b, scaling, parts.get("lora_magnitude"))
    return tree.unflatten(leaves)


@jax.jit
def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array, magnitude: jax.Array | None) -> jax.Array:
    """One W [..., in, out] of `merge` with its adapter, in its own dtype."""
    scaled_b = jnp.asarray(b) * jnp.asarray(scaling)[..., None, None]
    whole = jnp.asarray(kernel, jnp.float32) + jnp.matmul(a, scaled_b, precision="highest")
    if magnitude is not None:
        factor = magnitude / jnp.linalg.norm(whole, axis=-2)
        whole = whole * jnp.where(jnp.asarray(scaling)[..., None] == 0, 1, factor)[..., None, :]
    return whole.astype(kernel.dtype)


def _principal(kernel: jax.Array, scaling: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A, B, what is left of W) from W [..., in, out] and scale [...]."""

    def split(kernel: jax.Array, scaling: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(jnp.where(scaling == 0, 0, s[:rank] / scaling))
        a, b = u[:, :rank] * root, root[:, None] * v[:rank]
        left = kernel - scaling * jnp.matmul(a, b, precision="highest")
        return a, b, left.astype(kernel.dtype)

    if kernel.ndim == 2:
        return split(kernel, scaling)
    return jax.lax.map(lambda layer: split(*layer), (kernel, scaling))  # one layer at a time, to save memory


def _norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    return column_norms(kernel.astype(jnp.float32), a, b * scaling[..., None, None])
