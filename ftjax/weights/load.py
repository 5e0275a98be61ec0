"""From a reader of Hugging Face tensors to our parameter tree, each process reading only its own parts."""

import re
from typing import Any

import jax
import numpy as np

from ftjax import quant, tree
from ftjax.errors import UserError
from ftjax.models.families import family_of
from ftjax.models.groups import stacks
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree
from ftjax.weights.hf.keys import FLOATS, Key, finite_cast, hf_names
from ftjax.weights.hf.streaming import filled
from ftjax.weights.source import Reader


def load_params(reader: Reader, spec: DecoderSpec, abstract: Tree) -> Tree:
    """The parameters of `abstract`, as `load_variables` reads them."""
    return load_variables(reader, spec, abstract)["params"]


def load_variables(reader: Reader, spec: DecoderSpec, abstract: Tree, packed: Tree | None = None) -> dict[str, Tree]:
    """{"params"} of `abstract` (ShapeDtypeStructs, all of the model's or some), and {"quant"} in the place of the
    kernels that `packed` describes: read, transposed, stacked, cast, placed.

    A leaf with a `.sharding` (a NamedSharding) becomes an array with that sharding, made from the parts that this
    process's devices hold, each read once; a leaf without one becomes an ordinary array on the default device.
    Kernels are quantized as they are read, one tensor at a time, so that they are never all there unquantized. Each
    process reads the whole of such a tensor, since its scales are made of all its values.

    Raises UserError with the complete list when tensors are missing, unknown, of another shape or not
    floating point, and when a value is NaN, infinite, or beyond the range of the leaf's dtype.
    """
    keys, leaves = hf_names(spec), tree.flatten(abstract)
    if wrong := [path for path, leaf in leaves.items() if path not in keys or leaf.shape != keys[path].our_shape]:
        raise ValueError(f"the tree to load is not that of {spec}: {', '.join(wrong)}")
    stored = stored_names(reader, spec.vision is not None)
    _check(reader, stored, spec, keys)
    modules = tree.by_module(packed or {})
    quantized = {name: _quantized(reader, stored, keys[f"{name}/kernel"], its) for name, its in modules.items()}
    plain = {path: _array(reader, stored, keys[path], leaf) for path, leaf in leaves.items()}
    variables = {"params": tree.unflatten(plain)}
    return variables | {"quant": tree.unflatten(quantized)} if modules else variables


def stored_names(reader: Reader, vision: bool = False) -> dict[str, str]:
    """{Hugging Face name as transformers has it: as the files have it}, less what the family has no use for.

    vision: with those of a vision tower, which the language model alone has no use for.
    """
    family = family_of(reader.config)
    ignored, read_as = family.ignored, family.read_as
    if vision:
        ignored, read_as = None, family.vision.read_as + family.read_as
    further = _further_layers(reader.config)
    out: dict[str, str] = {}
    twice = []
    for name in sorted(reader.names()):
        if name.startswith(further) or (ignored and re.search(ignored, name)):
            continue
        found = next(((old, new) for old, new in read_as if name.startswith(old)), ("", ""))
        meant = found[1] + name.removeprefix(found[0])
        if meant in out:
            twice.append(f"{meant}: as {out[meant]} and as {name}")
        out[meant] = name
    if twice:
        heading = f"{reader.path}: some tensors are there under two names:"
        raise UserError("\n  ".join([heading, *twice]) + "\nTake the ones that are not meant out of the files.")
    return out


def _further_layers(config: dict[str, Any]) -> tuple[str, ...]:
    """What the names of layers begin with that predict further tokens: files number them after the decoder's own.

    DeepSeek-AI 2024, arXiv 2412.19437, section 2.2. They are neither read nor written.
    """
    layers, count = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if type(layers) is not int or type(count) is not int:
        return ()
    return tuple(f"model.layers.{layers + number}." for number in range(min(count, 16)))


def _check(reader: Reader, stored: dict[str, str], spec: DecoderSpec, keys: dict[str, Key]) -> None:
    # Otherwise the list below could be as long as a corrupt config makes it.
    layers = max(spec.num_hidden_layers, spec.vision.num_hidden_layers if spec.vision else 0)
    if layers > len(stored):
        raise UserError(
            f"{reader.path}: the config says num_hidden_layers={layers}, but there are only "
            f"{len(stored)} tensors; the config belongs to other weights"
        )
    expected = {name: key.shape for key in keys.values() for name in key.names()}
    problems = [f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored.keys())]
    unknown = sorted(stored.keys() - expected.keys())
    problems += [f"unknown: {name}" for name in unknown if not _ignored(name, spec) and not _replaced(name, spec)]
    for name in sorted(expected.keys() & stored.keys()):
        shape, dtype = reader.shape(stored[name]), reader.dtype(stored[name])
        if shape != expected[name]:
            problems.append(f"shape: {name} is {list(shape)}, by the config {list(expected[name])}")
        elif dtype.name not in FLOATS:
            problems.append(f"type: {name} is {dtype.name}, not floating point of 16 bits or more")
    if problems:
        heading = f"{reader.path}: these are not the weights of the {spec.family} model in its config:"
        raise UserError(
            "\n  ".join([heading, *problems])
            + "\nUse the config.json that belongs to the weights, without adapters or quantization in them."
        )
    _check_tied_head(reader, stored, spec, keys["embed_tokens/embedding"])


def _check_tied_head(reader: Reader, stored: dict[str, str], spec: DecoderSpec, embedding: Key) -> None:
    """UserError where a config says that the head is the embedding, and the files have another head."""
    head, rows = stored.get("lm_head.weight"), max(1, 2**24 // spec.hidden_size)
    if head is None or not spec.tie_word_embeddings:
        return
    both = head, stored[embedding.name(())]
    if reader.shape(both[0]) == reader.shape(both[1]) == embedding.shape:
        parts = (slice(start, start + rows) for start in range(0, spec.vocab_size, rows))
        if all(np.array_equal(*(reader.read(name, (part, slice(None))) for name in both)) for part in parts):
            return
    raise UserError(
        f"{reader.path}: lm_head.weight is not the embedding, as tie_word_embeddings says in config.json; set that to "
        "false, or take lm_head.weight out of the files"
    )


def _ignored(name: str, spec: DecoderSpec) -> bool:
    # Older files store the RoPE frequencies, which follow from the config, and a tied head as a second copy.
    return name.endswith("rotary_emb.inv_freq") or (spec.tie_word_embeddings and name == "lm_head.weight")


def _replaced(name: str, spec: DecoderSpec) -> bool:
    """Whether it is of keys or values of a layer that uses another's: files may have them all the same."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([kv]_(proj|norm))\.(weight|bias)", name)
    users = {layer for stack in stacks(spec) if stack.spec.kv_layer is not None for layer in stack.layers}
    return found is not None and int(found[1]) in users


def _array(reader: Reader, stored: dict[str, str], key: Key, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    def read(place: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        name = key.name(place)
        return finite_cast(reader.read(stored[name], index), leaf.dtype, f"{reader.path}: {name}")

    return filled(leaf, read, depth=len(key.stack), transposed=key.transposed)


def _quantized(
    reader: Reader, stored: dict[str, str], key: Key, leaves: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of one quantized kernel, stacked and placed."""
    big = next(name for name in leaves if name in quant.KINDS)
    small: dict[tuple[int, ...], dict[str, np.ndarray]] = {}  # the scales, which are few, wait here for their turn
    latest: dict[tuple[int, ...], np.ndarray] = {}

    def codes(place: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        if place not in latest:
            latest.clear()
            name = key.name(place)
            whole = tuple(slice(None) for _ in key.shape)
            values = finite_cast(reader.read(stored[name], whole), np.float32, f"{reader.path}: {name}")
            arrays = _quantize(values.swapaxes(-1, -2) if key.transposed else values, big)
            latest[place] = arrays.pop(big)
            small[place] = arrays
        return latest[place][index]

    depth = len(key.stack)
    out = {big: filled(leaves[big], codes, depth)}
    for name, leaf in leaves.items():
        if name != big:
            out[name] = filled(leaf, lambda place, index, name=name: small[place][name][index], depth)
    return out


def _quantize(kernel: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """One tensor's kernel [in, out], or [experts, in, out]."""
    if kernel.ndim == 2:
        return jax.device_get(quant.quantize(kernel, kind))
    parts = [_quantize(one, kind) for one in kernel]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
