"""From a reader of Hugging Face tensors to our parameter tree, each device getting only its own slices."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import family_of
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
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: key.our_shape for path, key in keys.items()}:
        raise ValueError(f"the tree to load is not that of {spec}")
    stored = _stored_names(reader)
    _check(reader, stored, spec, keys)
    return tree.unflatten({path: _array(reader, stored, keys[path], leaf) for path, leaf in leaves.items()})


def _stored_names(reader: Reader) -> dict[str, str]:
    """{Hugging Face name as transformers has it: as the files have it}, less what the family has no use for."""
    family = family_of(reader.config)
    out = {}
    for name in reader.names():
        if family.ignored and re.search(family.ignored, name):
            continue
        found = next(((old, new) for old, new in family.read_as if name.startswith(old)), ("", ""))
        out[found[1] + name.removeprefix(found[0])] = name
    return out


def _check(reader: Reader, stored: dict[str, str], spec: DecoderSpec, keys: dict[str, Key]) -> None:
    # Otherwise the list below could be as long as a corrupt config makes it.
    if spec.num_hidden_layers > len(stored):
        raise UserError(
            f"{reader.path}: the config says num_hidden_layers={spec.num_hidden_layers}, but there are only "
            f"{len(stored)} tensors; the config belongs to other weights"
        )
    expected = {name: key.shape for key in keys.values() for name in key.names()}
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored.keys())]
    problems += [f"unknown: {name}" for name in sorted(stored.keys() - expected.keys()) if not _ignored(name, spec)]
    for name in sorted(expected.keys() & stored.keys()):
        shape, dtype = reader.shape(stored[name]), reader.dtype(stored[name])
        if shape != expected[name]:
            problems.append(f"shape: {name} is {list(shape)}, by the config {list(expected[name])}")
        elif dtype.name not in FLOATS:
            problems.append(f"type: {name} is {dtype.name}, not floating point of 16 bits or more")
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


def _array(reader: Reader, stored: dict[str, str], key: Key, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of our parameter, e.g. [all layers, in, a device's part of out]."""
        lead, inner = index[: len(key.stack)], index[len(key.stack) :]
        inner = inner[::-1] if key.transposed else inner
        chosen = [range(size)[part] for part, size in zip(lead, key.stack)]
        parts = []
        for place in itertools.product(*chosen):
            name = key.name(place)
            values = finite_cast(reader.read(stored[name], inner), leaf.dtype, f"{reader.path}: {name}")
            parts.append(values.T if key.transposed else values)
        return np.stack(parts).reshape(*map(len, chosen), *parts[0].shape) if chosen else np.ascontiguousarray(parts[0])

    if leaf.sharding is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    done: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share one reading of it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        place = tuple(s.indices(size) for s, size in zip(index, leaf.shape))
        if place not in done:
            done[place] = read(index)
        return done[place]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
