"""From a reader of Hugging Face tensors to our parameter tree, each device getting only its own slices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.keys import FLOATS, Key, finite_cast, hf_names
from ftjax.weights.source import Reader


def load_params(reader: Reader, spec: DecoderSpec, abstract: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `abstract` (a dict of ShapeDtypeStruct): read, transposed, stacked, cast, placed.

    A leaf with a `.sharding` becomes an array with that sharding, made from the slices that this process's
    devices need, each read once; a leaf without one becomes an ordinary array on the default device.

    Raises UserError with the complete list when tensors are missing, unknown, of another shape or not
    floating point, and when a value is NaN, infinite, or beyond the range of the leaf's dtype.
    """
    keys = hf_names(spec)
    leaves = tree.flatten(abstract)
    layers = spec.num_hidden_layers
    if {path: leaf.shape for path, leaf in leaves.items()} != {
        p: key.our_shape(layers) for p, key in keys.items()
    }:
        raise ValueError(f"the tree to load is not that of {spec}")
    _check(reader, spec, keys)
    return tree.unflatten({path: _array(reader, keys[path], layers, leaf) for path, leaf in leaves.items()})


def _check(reader: Reader, spec: DecoderSpec, keys: dict[str, Key]) -> None:
    stored = reader.names()
    if spec.num_hidden_layers > len(
        stored
    ):  # or the list below could be as long as a corrupt config makes it
        raise UserError(
            f"{reader.path}: the config says num_hidden_layers={spec.num_hidden_layers}, but there are only "
            f"{len(stored)} tensors; the config belongs to other weights"
        )
    expected = {name: key.shape for key in keys.values() for name in key.names(spec.num_hidden_layers)}
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored)]
    problems += [f"unknown: {name}" for name in sorted(stored - expected.keys()) if not _ignored(name, spec)]
    for name in sorted(expected.keys() & stored):
        if reader.shape(name) != expected[name]:
            problems.append(
                f"shape: {name} is {list(reader.shape(name))}, by the config {list(expected[name])}"
            )
        elif reader.dtype(name).name not in FLOATS:
            problems.append(
                f"type: {name} is {reader.dtype(name).name}, not floating point of 16 bits or more"
            )
    if problems:
        raise UserError(
            "\n  ".join(
                [
                    f"{reader.path}: these are not the weights of the {spec.family} model in its config:",
                    *problems,
                ]
            )
            + "\nUse the config.json that belongs to the weights, without adapters or quantisation in them."
        )


def _ignored(name: str, spec: DecoderSpec) -> bool:
    # Older files store the RoPE frequencies, which follow from the config, and a tied head as a second copy.
    return name.endswith("rotary_emb.inv_freq") or (spec.tie_word_embeddings and name == "lm_head.weight")


def _array(reader: Reader, key: Key, layers: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.sharding is None:
        return jnp.asarray(_read(reader, key, layers, leaf, (slice(None),) * len(leaf.shape)))
    done: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        place = tuple(s.indices(size) for s, size in zip(index, leaf.shape))
        if place not in done:
            done[place] = _read(reader, key, layers, leaf, index)
        return done[place]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _read(
    reader: Reader, key: Key, layers: int, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of one of our parameters, e.g. [layers of this device, in, its part of out]."""
    names = key.names(layers)
    if key.stacked:
        names, index = names[index[0]], index[1:]
    if key.transposed:
        index = index[::-1]
    result = None
    for position, name in enumerate(names):
        values = finite_cast(reader.read(name, index), leaf.dtype, f"{reader.path}: {name}")
        values = values.T if key.transposed else values
        if not key.stacked:
            return np.ascontiguousarray(values)
        if result is None:
            result = np.empty((len(names), *values.shape), leaf.dtype)
        result[position] = values
    assert result is not None, f"no layer of {key.template} in this part"
    return result
