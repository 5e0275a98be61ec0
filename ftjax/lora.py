"""Adapters as a tree beside the parameters: LoRA (Hu et al. 2021), rsLoRA, DoRA and PiSSA.

y = x W + scale (x A) B. An adapter tree has the paths of the layers it adapts, each with `lora_a` [L, in, r],
`lora_b` [L, r, out] and `lora_scale` [L], float32: without L where layers are not stacked, with the number of experts
after it where experts are. For an embedding `in` is the vocabulary. Some have `lora_magnitude` [L, out] (DoRA),
`lora_dropout` [L], a rate, and `lora_a0`, `lora_b0` (PiSSA: what was taken out of W).
The model reads it as its `lora` collection; training differentiates what TRAINABLE matches.
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


def linear_kernels(paths: Iterable[str]) -> list[str]:
    """Of all parameter paths the kernels of linear layers: not those of a mixture's experts and router."""
    found = [path for path in paths if path.endswith("/kernel")]
    return sorted(path for path in found if "/experts/" not in path and "/router/" not in path)


def adaptable(paths: Iterable[str]) -> list[str]:
    """Everything that can have an adapter: linear layers, experts, the token embedding."""
    paths = list(paths)
    others = [path for path in paths if "/experts/" in path and path.endswith("/kernel")]
    return sorted([*linear_kernels(paths), *others, *(path for path in paths if path == "embed_tokens/embedding")])


def find_targets(targets: str | Sequence[str], kernels: Sequence[str]) -> list[str]:
    """Which of the paths of `adaptable` to adapt.

    targets: "all-linear" (every linear layer but the output head, as in peft), module names such as "q_proj,v_proj" or
    ["q_proj", "v_proj"], or one regular expression searched in the path. A name or pattern that matches nothing raises
    UserError.
    """
    kernels = sorted(kernels)
    if isinstance(targets, str) and re.fullmatch(r"\w+(,\w+)+", targets):
        targets = targets.split(",")
    if targets == "all-linear":
        return [path for path in linear_kernels(kernels) if not path.startswith("lm_head/")]
    if isinstance(targets, str):
        return tree.matching(targets, kernels, "adapter.targets")
    if not targets:
        raise UserError("adapter.targets is empty; use 'all-linear', module names or a regular expression")
    by_name = {name: [path for path in kernels if path.split("/")[-2] == name] for name in targets}
    if missing := [name for name, found in by_name.items() if not found]:
        known = sorted({path.split("/")[-2] for path in kernels})
        raise UserError(f"adapter.targets: no linear layer named {missing}; there are {', '.join(known)}")
    return sorted({path for found in by_name.values() for path in found})


def by_pattern(
    default: float, patterns: Sequence[tuple[str, float]], targets: Sequence[str], key: str
) -> dict[str, float]:
    """{path: the value of the last pattern found in it, or `default`}. A pattern that matches nothing is an error."""
    values = dict.fromkeys(targets, default)
    for pattern, value in patterns:
        values |= dict.fromkeys(tree.matching(pattern, list(targets), key), value)
    return values


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

    rank: one for all, or {path: rank}; extras: of "magnitude", "dropout" and "pissa" what the adapters have besides.
    A follows the input axis of the kernel it adapts, B and the magnitude the output axis. A rank larger than a kernel
    is an error, as are extras for embeddings and experts.
    """
    leaves = tree.flatten(params)
    out = {}
    for path in targets:
        *stack, rows, columns = leaves[path].shape
        *stack_axes, row_axis, column_axis = axes[path]
        r = rank if isinstance(rank, int) else rank[path]
        if r < 1 or r > min(rows, columns):
            limit = min(rows, columns)
            raise UserError(f"adapter.rank={r} does not fit {path} [{rows}, {columns}]; use 1 to {limit}")
        if extras and path not in linear_kernels([path]):
            raise UserError(f"adapter.targets: {path} is not a linear layer, so it can have no {', no '.join(extras)}")
        a = ((*stack, rows, r), (*stack_axes, row_axis, "rank"))
        b = ((*stack, r, columns), (*stack_axes, "rank", column_axis))
        one = (tuple(stack), tuple(stack_axes))
        parts = {"lora_a": a, "lora_b": b, "lora_scale": one}
        parts |= {"lora_magnitude": ((*stack, columns), (*stack_axes, column_axis))} if "magnitude" in extras else {}
        parts |= {"lora_dropout": one} if "dropout" in extras else {}
        parts |= {"lora_a0": a, "lora_b0": b} if "pissa" in extras else {}
        for name, (shape, logical) in parts.items():
            where = sharding.named(mesh, logical, shape)
            out[f"{_module(path)}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    return tree.unflatten(out)


def init_adapters(abstract: Tree, seed: int, scaling: float | Mapping[str, float], dropout: float = 0.0) -> Tree:
    """A Gaussian with variance 1 / (3 in), that of peft's default; B zero: the adapted model starts as the base.

    For an embedding it is A that is zero and B that is random, with variance 1. scaling: one for all, or {path of the
    adapted parameter: scale}. The values depend on seed and path only, not on the mesh or on which other layers are
    adapted. `lora_magnitude` and PiSSA's parts are left zero, for `with_magnitudes` and `pissa`.
    """
    leaves = tree.flatten(abstract)
    by_module = None if isinstance(scaling, int | float) else {_module(path): one for path, one in scaling.items()}

    def value(path, leaf):
        module, name = path.rsplit("/", 1)
        if name == ("lora_b" if module.startswith("embed") else "lora_a"):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            deviation = 1.0 if name == "lora_b" else (3 * leaf.shape[-2]) ** -0.5
            return jax.random.normal(key, leaf.shape, leaf.dtype) * deviation
        constant = {"lora_scale": scaling if by_module is None else by_module[module], "lora_dropout": dropout}
        return jnp.full(leaf.shape, constant.get(name, 0.0), leaf.dtype)

    def make():
        return {path: value(path, leaf) for path, leaf in leaves.items()}

    return tree.unflatten(jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in leaves.items()})())


def with_magnitudes(kernel: Callable[[str], jax.Array], adapters: Tree) -> Tree:
    """Sets every `lora_magnitude` to the norms of the columns of W + scale A B, so that DoRA starts as its base.

    kernel: module -> its W, of any float dtype.
    """
    leaves = tree.flatten(adapters)
    for path in [path for path in leaves if path.endswith("/lora_magnitude")]:
        module = path.removesuffix("/lora_magnitude")
        norms = jax.jit(_norms, out_shardings=leaves[path].sharding)
        parts = [leaves[f"{module}/{part}"] for part in ("lora_a", "lora_b", "lora_scale")]
        leaves[path] = norms(kernel(module), *parts)
    return tree.unflatten(leaves)


def pissa(params: Tree, adapters: Tree) -> tuple[Tree, Tree]:
    """PiSSA (Meng et al. 2024): A and B get the largest singular values of each W, which becomes what is left of it.

    (params, adapters) with A = U sqrt(S / scale), B = sqrt(S / scale) V and W - scale A B; `lora_a0` and `lora_b0` keep
    these first A and B, by which the trained adapter differs from the base as it was.
    """
    leaves, lora = tree.flatten(params), tree.flatten(adapters)
    for module in [path.removesuffix("/lora_a") for path in lora if path.endswith("/lora_a")]:
        kernel, names = leaves[f"{module}/kernel"], [f"{module}/lora_a", f"{module}/lora_b"]
        where = (lora[names[0]].sharding, lora[names[1]].sharding, kernel.sharding)
        split = jax.jit(_principal, static_argnums=2, out_shardings=where)
        a, b, leaves[f"{module}/kernel"] = split(kernel, lora[f"{module}/lora_scale"], lora[names[0]].shape[-1])
        # Copies: the step donates what is trained.
        lora |= dict(zip(names, (a, b))) | {f"{module}/lora_a0": jnp.copy(a), f"{module}/lora_b0": jnp.copy(b)}
    return tree.unflatten(leaves), tree.unflatten(lora)


def merge(params: Tree, adapters: Tree) -> Tree:
    """W + scale A B for every adapted layer, with DoRA's norms, in float32 and cast back to W's dtype."""
    leaves, lora = tree.flatten(params), tree.flatten(adapters)
    for path in [path for path in lora if path.endswith("/lora_a")]:
        module = path.removesuffix("/lora_a")
        name = f"{module}/embedding" if f"{module}/embedding" in leaves else f"{module}/kernel"
        parts = [lora[f"{module}/{part}"] for part in ("lora_a", "lora_b", "lora_scale")]
        leaves[name] = _merged(leaves[name], *parts, lora.get(f"{module}/lora_magnitude"))
    return tree.unflatten(leaves)


@jax.jit
def _merged(kernel, a, b, scaling, magnitude):
    scaled_b = jnp.asarray(b) * jnp.asarray(scaling)[..., None, None]
    whole = jnp.asarray(kernel, jnp.float32) + jnp.matmul(a, scaled_b, precision="highest")
    if magnitude is not None:
        whole = whole * (magnitude / jnp.linalg.norm(whole, axis=-2))[..., None, :]
    return whole.astype(kernel.dtype)


def _principal(kernel, scaling, rank):
    def split(kernel, scaling):
        u, s, v = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank] / scaling)
        a, b = u[:, :rank] * root, root[:, None] * v[:rank]
        left = kernel - scaling * jnp.matmul(a, b, precision="highest")
        return a, b, left.astype(kernel.dtype)

    if kernel.ndim == 2:
        return split(kernel, scaling)
    return jax.lax.map(lambda layer: split(*layer), (kernel, scaling))  # one layer at a time


def _norms(kernel, a, b, scaling):
    return column_norms(kernel.astype(jnp.float32), a, b * scaling[..., None, None])


def _module(path: str) -> str:
    """layers/mlp/up_proj of layers/mlp/up_proj/kernel"""
    return path.rpartition("/")[0]
