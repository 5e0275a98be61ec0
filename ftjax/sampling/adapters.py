"""Adapters of one base side by side, of which every row of a batch has its own: none is merged, none compiles anew.

A stack is a tree like lora.py's without scales: `lora_a` [L, adapters, in, r] and `lora_b` [L, adapters, r, out] for
each module that any of them adapts, B times its scale; without L outside the layers. Ranks are filled up with zeros to
the largest, and what an adapter does not adapt is zeros. It lies on the devices as adapters do in training.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax import sharding, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.params import logical_axes, shapes
from ftjax.tree import Tree

COLLECTION = "adapters"  # beside "params", of the variables that the engine hands to what is compiled

ALONE = "merge it into its base (python -m ftjax.export --format merged), or serve it alone"


def stack(
    model: Decoder,
    variables: Tree,
    adapters: Sequence[Tree | None],
    rank: int | None = None,
    targets: Sequence[str] = (),
) -> Tree:
    """Adapters as lora.py has them -> their stack, in the model's dtype, beside the base's `variables`.

    adapters: None is a place for one that comes later, see `replace`.
    rank, targets: what later ones may have besides what these have: a larger rank, more kernels (lora.find_targets).

    Raises UserError for an adapter that does not fit the base or cannot be served row by row: of experts, or DoRA's.
    """
    if not adapters:
        raise UserError("adapters is empty; give at least one adapter, or None for a place")
    known, axes = shapes(model), logical_axes(model)
    given = [_modules(adapter, f"adapter {number}") for number, adapter in enumerate(adapters)]
    adapted = {module for modules in given for module in modules} | {path.rpartition("/")[0] for path in targets}
    ranks = [parts["lora_a"].shape[-1] for modules in given for parts in modules.values()]
    if not adapted:
        raise UserError("no adapter adapts anything; say in `targets` what those that come later may adapt")
    largest, mesh, out = max([rank or 1, *ranks]), _mesh(variables), {}
    for module in sorted(adapted):
        path = next((path for path in (f"{module}/kernel", f"{module}/embedding") if path in known), None)
        if path is None or "/experts/" in path:
            raise UserError(
                f"{module}: the model has no linear layer and no embedding of this name that rows can have adapters "
                "of; use adapters and targets of this base"
            )
        *layers, rows, columns = known[path]
        *layer_axes, row_axis, column_axis = axes[path]
        parts = {"lora_a": ((rows, largest), (row_axis, "rank")), "lora_b": ((largest, columns), ("rank", column_axis))}
        for name, (shape, own) in parts.items():
            shape = (*layers, len(adapters), *shape)
            placed = None if mesh is None else sharding.named(mesh, (*layer_axes, None, *own), shape)
            out[f"{module}/{name}"] = jnp.zeros(shape, model.dtype, device=placed)
    stacked = tree.unflatten(out)
    for number, adapter in enumerate(adapters):
        stacked = replace(stacked, number, adapter)
    return stacked


def count(stacked: Tree) -> int:
    """How many adapters there are."""
    return jax.tree.leaves(stacked)[0].shape[-3]


def replace(stacked: Tree, number: int, adapter: Tree | None) -> Tree:
    """The stack, which is donated, with `adapter` at `number`, or with nothing there; it compiles for no second one.

    Raises UserError for an adapter that cannot be served, or has a larger rank or more modules than the stack.
    """
    name, places, out = f"adapter {number}", tree.by_module(stacked), {}
    modules = _modules(adapter, name)
    if more := sorted(modules.keys() - places.keys()):
        raise UserError(f"{name}: {more[0]} is adapted, for which the stack has no place; make it with these `targets`")
    for module, its in places.items():
        # Filled up on the host, where no rank compiles.
        a, b = (np.zeros(x.shape[:-3] + x.shape[-2:], x.dtype) for x in (its["lora_a"], its["lora_b"]))
        if parts := modules.get(module):
            new_a, new_b, scale = (np.asarray(parts[leaf]) for leaf in ("lora_a", "lora_b", "lora_scale"))
            rank = new_a.shape[-1]
            if new_a.shape[:-1] != a.shape[:-1] or new_b.shape[-1] != b.shape[-1]:
                sizes = [new_a.shape[-2], new_b.shape[-1]], [a.shape[-2], b.shape[-1]]
                raise UserError(f"{name}: {module} is {sizes[0]}, and {sizes[1]} in the base; use one of this base")
            if rank > a.shape[-1]:
                raise UserError(
                    f"{name}: {module} has rank {rank}, and the stack is for {a.shape[-1]}; make it with rank={rank}"
                )
            a[..., :rank], b[..., :rank, :] = new_a, new_b * scale[..., None, None]
        out[module] = {"lora_a": a, "lora_b": b}
    layouts = jax.tree.map(lambda leaf: leaf.sharding, stacked)
    put = jax.jit(_put, donate_argnums=0, out_shardings=layouts)
    return put(stacked, np.int32(number), tree.unflatten(out))


def of_rows(variables: Tree, rows: jax.Array) -> Tree:
    """The variables with a `lora` collection whose rows have the adapters `rows`, int32 [batch]; -1 is none.

    Those without a stack as they are.
    """
    if COLLECTION not in variables:
        return variables
    modules = tree.by_module(variables[COLLECTION])
    for parts in modules.values():
        parts["lora_row"] = jnp.broadcast_to(rows, (*parts["lora_a"].shape[:-3], len(rows)))
    others = {name: leaves for name, leaves in variables.items() if name != COLLECTION}
    return others | {"lora": tree.unflatten(modules)}


def _put(stacked: Tree, number: jax.Array, adapter: Tree) -> Tree:
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(old, new, number, old.ndim - 3)

    return jax.tree.map(put, stacked, adapter)


def _modules(adapter: Tree | None, name: str) -> dict[str, dict[str, jax.Array]]:
    """The adapter by modules, {} for none; UserError for what has no row of its own."""
    modules = tree.by_module(adapter or {})
    for module, parts in modules.items():
        if "/experts/" in module:
            raise UserError(f"{name}: {module} adapts experts, which have no adapters for each row; {ALONE}")
        if "lora_magnitude" in parts:
            raise UserError(f"{name}: {module} has magnitudes (DoRA), which no row can have of its own; {ALONE}")
        if "lora_a0" in parts:
            raise UserError(
                f"{name}: {module} is PiSSA's, of a base that it changed; use its export (--format peft), which is of "
                "the base as it was"
            )
    return modules


def _mesh(variables: Tree) -> Mesh | None:
    """The mesh that the variables lie on."""
    placed = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    return placed.mesh if isinstance(placed, NamedSharding) else None
