"""How far training moved the weights, layer by layer: ||W' - W|| / ||W|| in the Frobenius norm."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ftjax import lora, quant, tree
from ftjax.models.groups import stack_of
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree


def drift(spec: DecoderSpec, tuned: Tree, base: Tree) -> tuple[dict[int, float], dict[str, float]]:
    """({layer: relative change of all its weights together}, {module outside the layers: that of its weights}).

    Adapters count as what they add to their layer's weights, quantized kernels as what they stand for. One layer of one
    module is made whole at a time. tuned, base: variables of one model, such as `policy_and_reference` gives.
    """
    ours, theirs = (_by_parameter(variables) for variables in (tuned, base))
    layers: dict[int, list[float]] = {number: [0.0, 0.0] for number in range(spec.num_hidden_layers)}
    others: dict[str, list[float]] = {}
    for path, parts in ours.items():
        stack = stack_of(spec, path)
        squares = jax.device_get(_squares(stack is not None, parts, theirs[path]))
        if stack is None:
            others[path.rpartition("/")[0]] = [float(square) for square in squares]
            continue
        for layer, *its in zip(stack.layers, *squares, strict=True):
            layers[layer] = [total + float(square) for total, square in zip(layers[layer], its, strict=True)]
    return (
        {layer: _relative(*squares) for layer, squares in layers.items()},
        {name: _relative(*squares) for name, squares in others.items()},
    )


def _by_parameter(variables: Tree) -> dict[str, dict[str, jax.Array]]:
    """{path of a parameter: what its value is made of}: itself or the arrays of `quant`, and those of its adapter."""
    leaves, adapters = tree.flatten(variables["params"]), tree.by_module(variables.get("lora", {}))
    out = {path: {"weight": leaf} for path, leaf in leaves.items()}
    out |= {f"{module}/kernel": packed for module, packed in tree.by_module(variables.get("quant", {})).items()}
    for module, parts in adapters.items():
        path = f"{module}/embedding" if f"{module}/embedding" in leaves else f"{module}/kernel"
        out[path] = out[path] | {name: leaf for name, leaf in parts.items() if name.startswith("lora_")}
    return out


@functools.partial(jax.jit, static_argnums=0)
def _squares(
    stacked: bool, tuned: Mapping[str, jax.Array], base: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(||W' - W||^2, ||W||^2) of one parameter, float32 []; or [L] where it is stacked, one layer after the other."""

    def of_one(parts: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        ours, theirs = map(_whole, parts)
        return jnp.sum((ours - theirs) ** 2), jnp.sum(theirs**2)

    return jax.lax.map(of_one, (tuned, base)) if stacked else of_one((tuned, base))


def _whole(parts: Mapping[str, jax.Array]) -> jax.Array:
    """float32: the value of a parameter with its adapter."""
    weight = parts["weight"] if "weight" in parts else quant.dequantize(dict(parts), jnp.float32)
    weight = weight.astype(jnp.float32)
    if "lora_a" not in parts:
        return weight
    names = ("lora_a", "lora_b", "lora_scale")
    return lora.merged(weight, *(parts[name] for name in names), parts.get("lora_magnitude"))


def _relative(change: float, whole: float) -> float:
    return (change / whole) ** 0.5 if whole else 0.0
