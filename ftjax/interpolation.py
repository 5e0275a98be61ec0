"""Between a base and what was trained from it: W = base + share (tuned - base), for every way to train.

WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, section 3): on the line between both, much of what was learned is there
long before all that was forgotten is gone.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.models.adapter import column_norms
from ftjax.tree import Tree

HELP = "how far to go from the base to what was trained: 1 is all the way, 0.7 forgets less and has learned less"


def check(share: float) -> float:
    """The value of --interpolate; UserError where it is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise UserError(f"--interpolate={share:g}: it must be above 0, which is the base itself, and at most 1")
    return share


def changed(paths: Iterable[str], is_trained: Callable[[str], bool]) -> set[str]:
    """The parameters, of the variables' `paths`, that are not the base's own: trained whole, or changed by PiSSA."""
    paths = set(paths)
    trained = {path.removeprefix("params/") for path in paths if path.startswith("params/") and is_trained(path)}
    split = {path.split("/", 1)[1].rpartition("/")[0] for path in paths if path.endswith("/lora_a0")}
    return trained | {f"{module}/kernel" for module in split}


def interpolated(
    variables: Tree, base: Mapping[str, jax.Array], kernel: Callable[[Tree, str], jax.Array], share: float
) -> Tree:
    """The variables of the model that is `share` of the way from its base to `variables`; adapters stay adapters.

    base: {path: the base's own value} of the parameters that are `changed`.
    kernel: (variables, module) -> W, of any float dtype.
    """
    params, modules = tree.flatten(variables["params"]), tree.by_module(variables.get("lora", {}))
    for module, parts in modules.items():
        if "lora_a0" in parts:
            modules[module] = lora.of_whole_base(parts)
            params[f"{module}/kernel"] = base[f"{module}/kernel"]
    for path, value in base.items():
        if path.rpartition("/")[0] not in modules:
            params[path] = jax.jit(_between, out_shardings=params[path].sharding)(value, params[path], share)
    variables = variables | {"params": tree.unflatten(params)}
    if not modules:
        return variables
    for module, parts in modules.items():
        if "lora_magnitude" not in parts:
            parts["lora_scale"] = parts["lora_scale"] * share
            continue
        layouts = (parts["lora_b"].sharding, parts["lora_magnitude"].sharding)
        its = (parts["lora_a"], parts["lora_b"], parts["lora_scale"], parts["lora_magnitude"])
        part = jax.jit(_dora, out_shardings=layouts)(kernel(variables, module), *its, share)
        parts["lora_b"], parts["lora_magnitude"] = part
    return variables | {"lora": tree.unflatten(modules)}


def _between(base: jax.Array, tuned: jax.Array, share: float) -> jax.Array:
    return (base + share * (tuned - base)).astype(tuned.dtype)


def _dora(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, magnitude: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """(B, magnitude) of the DoRA adapter whose weight is W + share (W' - W), W' being that of this one.

    W' = (W + s A B) c with the factors c = magnitude / norms of the columns. So what is wanted is
    W d + s A B share c, with d = 1 - share + share c: the columns of W + s A (B share c / d), each times d.
    """
    kernel, scaled = kernel.astype(jnp.float32), scale[..., None, None]
    factor = jnp.where(scale[..., None] == 0, 1, magnitude / column_norms(kernel, a, b * scaled))
    whole = 1 - share + share * factor
    b = b * (share * factor / whole)[..., None, :]
    return b, whole * column_norms(kernel, a, b * scaled)
