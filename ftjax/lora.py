"""LoRA (Hu et al. 2021) as a tree beside the parameters: y = x W + scale (x A) B, scale = alpha / r.

An adapter tree has the paths of the kernels it adapts, each with
`lora_a` [L, in, r], `lora_b` [L, r, out] and `lora_scale` [L] (all without L where layers are not stacked), float32.
The model reads it as its `lora` collection; training differentiates `lora_a` and `lora_b` only.
"""

import math
import re
import zlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.errors import UserError
from ftjax.tree import Tree

TRAINABLE = re.compile(r"^lora/.*/lora_[ab]$")


def linear_kernels(paths: Iterable[str]) -> list[str]:
    """Of all parameter paths the kernels that can be adapted: not those of a mixture's experts and router."""
    found = [path for path in paths if path.endswith("/kernel")]
    return sorted(path for path in found if "/experts/" not in path and "/router/" not in path)


def find_targets(targets: str | Sequence[str], kernels: Sequence[str]) -> list[str]:
    """Which of the kernel paths to adapt.

    targets: "all-linear" (every kernel but the output head's, as in peft), module names such as "q_proj,v_proj" or
    ["q_proj", "v_proj"], or one regular expression searched in the path. A name or pattern that matches nothing raises
    UserError.
    """
    kernels = sorted(kernels)
    if isinstance(targets, str) and re.fullmatch(r"\w+(,\w+)+", targets):
        targets = targets.split(",")
    if targets == "all-linear":
        return [path for path in kernels if not path.startswith("lm_head/")]
    if isinstance(targets, str):
        return tree.matching(targets, kernels, "adapter.targets")
    if not targets:
        raise UserError("adapter.targets is empty; use 'all-linear', module names or a regular expression")
    by_name = {name: [path for path in kernels if path.split("/")[-2] == name] for name in targets}
    if missing := [name for name, found in by_name.items() if not found]:
        known = sorted({path.split("/")[-2] for path in kernels})
        raise UserError(f"adapter.targets: no linear layer named {missing}; there are {', '.join(known)}")
    return sorted({path for found in by_name.values() for path in found})


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def abstract_adapters(
    params: Tree, axes: dict[str, tuple], targets: Sequence[str], rank: int, mesh: Mesh
) -> dict[str, Tree]:
    """The adapter tree as ShapeDtypeStructs with shardings, from the abstract `params` and their logical `axes`.

    A follows the input axis of the kernel it adapts and B the output axis. A rank larger than a kernel is an error.
    """
    leaves = tree.flatten(params)
    out = {}
    for path in targets:
        *stack, rows, columns = leaves[path].shape
        *stack_axes, row_axis, column_axis = axes[path]
        if rank < 1 or rank > min(rows, columns):
            limit = min(rows, columns)
            raise UserError(f"adapter.rank={rank} does not fit {path} [{rows}, {columns}]; use 1 to {limit}")
        module = path.removesuffix("/kernel")
        for name, shape, logical in (
            ("lora_a", (*stack, rows, rank), (*stack_axes, row_axis, "rank")),
            ("lora_b", (*stack, rank, columns), (*stack_axes, "rank", column_axis)),
            ("lora_scale", tuple(stack), tuple(stack_axes)),
        ):
            where = sharding.named(mesh, logical, shape)
            out[f"{module}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    return tree.unflatten(out)


def init_adapters(abstract: Tree, seed: int, scaling: float) -> Tree:
    """A Gaussian with variance 1 / (3 in), that of peft's default; B zero: the adapted model starts as the base.

    The values depend on seed and path only, not on the mesh or on which other layers are adapted.
    """
    leaves = tree.flatten(abstract)

    def make():
        out = {}
        for path, leaf in leaves.items():
            if path.endswith("lora_a"):
                key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
                out[path] = jax.random.normal(key, leaf.shape, leaf.dtype) * (3 * leaf.shape[-2]) ** -0.5
            else:
                out[path] = jnp.full(leaf.shape, scaling if path.endswith("lora_scale") else 0.0, leaf.dtype)
        return out

    return tree.unflatten(jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in leaves.items()})())


def with_scale(matrices: Tree, scaling: float) -> Tree:
    """Completes a tree of `lora_a` and `lora_b` alone (an adapter read from disk) with its `lora_scale` leaves."""
    leaves = tree.flatten(matrices)
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        leaves[path.replace("/lora_a", "/lora_scale")] = jnp.full(leaves[path].shape[:-2], scaling, jnp.float32)
    return tree.unflatten(leaves)


def merge(params: Tree, adapters: Tree) -> Tree:
    """W + scale A B for every adapted kernel, in float32, cast back to the kernel's dtype; other leaves unchanged."""
    leaves, lora = tree.flatten(params), tree.flatten(adapters)
    for path in [path for path in lora if path.endswith("/lora_a")]:
        module = path.removesuffix("/lora_a")
        kernel = leaves[f"{module}/kernel"]
        scaling = jnp.asarray(lora[f"{module}/lora_scale"])[..., None, None]
        delta = jnp.matmul(lora[path], lora[f"{module}/lora_b"], precision="highest") * scaling
        leaves[f"{module}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return tree.unflatten(leaves)
