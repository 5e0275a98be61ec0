"""A model as one GGUF file, as llama.cpp's converter lays it out: F16, BF16 or Q8_0."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from ftjax import atomic, tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config, text_config
from ftjax.models.spec import DecoderSpec
from ftjax.weights.gguf.config import ARCHITECTURES, architecture_of, hf_config
from ftjax.weights.gguf.header import Tensor, read_header, shorten
from ftjax.weights.gguf.names import Place, gguf_places, half_split
from ftjax.weights.gguf.read import GGUFReader
from ftjax.weights.hf.keys import finite_cast
from ftjax.weights.hf.write import check_fit

_F32, _F16, _Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
# {name for --gguf_type: (type of the matrices, type of the file)}
GGUF_TYPES = {
    "f16": (_F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# Matrices that stay float32, as in llama.cpp's converter. Vectors (norms, biases) do anyway.
_ALWAYS_F32 = ("/router/kernel", "embed_positions/embedding")


def write_gguf(
    out: Path,
    params: dict[str, Any],
    spec: DecoderSpec,
    config: Mapping[str, Any],
    gguf_type: str,
    tokenizer: Mapping[str, Any],
    name: str,
    base: str | None = None,
) -> None:
    """Writes the file `out`, which must not exist.

    `params` is the whole tree, of jax or NumPy arrays that this process holds all of; `config` the Hugging Face
    config they were loaded with. `tokenizer` holds the metadata of its tokenizer (`tokenizer.*`), made and checked by
    `ftjax.weights.gguf.tokenizer_write`. `name` and `base` become `general.name` and the base model's name.

    `gguf_type` is "f16", "bf16" or "q8_0". Norms, biases, routers and learned positions stay float32. With "q8_0" the
    embedding and the head are Q8_0 too, as llama.cpp has them, and a matrix whose rows do not divide into blocks of 32
    values is F16. The sliding window of a Mistral is written down, though llama.cpp sees all tokens in such a model.

    Tensors are converted and written one at a time, to a file beside `out`; then header and tensors are read back and
    compared (F16, BF16 and F32 with the cast values, Q8_0 with `gguf`'s quantization of them), and the file is synced
    and renamed.

    Raises UserError for a model that GGUF has no architecture or no keys for, for NaN, infinite or, after the cast,
    too large values, and when `out` exists; ValueError when `params` or `config` do not belong to `spec`.
    """
    if gguf_type not in GGUF_TYPES:
        raise UserError(f"no GGUF type {gguf_type!r}; there are: {', '.join(GGUF_TYPES)}")
    leaves = tree.flatten(params)
    config = text_config(dict(config))
    check_fit(leaves, spec, config)
    architecture, keys, extra = gguf_header(spec, config)
    metadata = keys | dict(tokenizer)
    places = gguf_places(spec, architecture)
    types = {tensor: _quantization_type(place, gguf_type) for tensor, place in places.items()}
    content = _Content(leaves, places, types, extra)

    with _new_file(Path(out)) as temporary:
        writer = GGUFWriter(temporary, architecture)
        try:
            _add_metadata(writer, metadata | _general(name, base, gguf_type))
            _write(writer, content)
        finally:
            writer.close()
        _verify(temporary, content, metadata)


class _Content(NamedTuple):
    """The tensors of a file."""

    leaves: Mapping[str, Any]  # {path: parameter}
    places: dict[str, Place]  # {GGUF name: the part of a parameter}
    types: dict[str, GGMLQuantizationType]  # {GGUF name: type in the file}
    extra: dict[str, np.ndarray]  # {GGUF name: values} of tensors that are no parameters, such as RoPE's factors


def _quantization_type(place: Place, gguf_type: str) -> GGMLQuantizationType:
    if len(place.shape) == 1 or place.path.endswith(_ALWAYS_F32):
        return _F32
    wanted, _ = GGUF_TYPES[gguf_type]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if place.shape[-1] % block == 0 else _F16


def gguf_header(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """(architecture, {key: value}, {name: further tensor}) of a model's file.

    Raises UserError for a model that GGUF has no architecture or no keys for: where reading these back gives another
    decoder.
    """
    architecture = architecture_of(spec.family)
    config = _as_header(text_config(dict(config)))
    spec = spec_from_config(config)
    keys, extra = ARCHITECTURES[architecture].metadata(spec, config)
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    _check_described(metadata, extra, spec, architecture)
    return architecture, metadata, extra


def _check_described(
    metadata: dict[str, Any], extra: dict[str, np.ndarray], spec: DecoderSpec, architecture: str
) -> None:
    empty = np.zeros(0, np.uint8)
    tensors = {name: Tensor(place.shape, _F32, empty) for name, place in gguf_places(spec, architecture).items()}
    tensors |= {name: Tensor(values.shape, _F32, values.view(np.uint8)) for name, values in extra.items()}
    advice = "export the Hugging Face format instead"
    try:
        config = hf_config(Path("this model"), metadata | {"general.architecture": architecture}, tensors)
        read = spec_from_config(config)
    except UserError as error:
        raise UserError(f"this model cannot be written as GGUF ({error}); {advice}") from error
    families = ARCHITECTURES[architecture].families
    if spec.family in families and read.family in families:  # Mistral without a window is a Llama
        read = dataclasses.replace(read, family=spec.family)
    ours, theirs = dataclasses.asdict(spec), dataclasses.asdict(read)
    if differing := [field for field in ours if ours[field] != theirs[field]]:
        raise UserError(
            f"this model cannot be written as GGUF: architecture {architecture!r} there has no word for its "
            + "; ".join(f"{field} {shorten(ours[field])} (it would be {shorten(theirs[field])})" for field in differing)
            + f". {advice[0].upper()}{advice[1:]}"
        )


def _as_header(value: Any) -> Any:
    """A config with its numbers as a header holds them, in float32: transformers writes some 1e-6 as
    9.999999974752427e-07, which is the same number there."""
    if isinstance(value, dict):
        return {key: _as_header(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_header(item) for item in value]
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _general(name: str, base: str | None, gguf_type: str) -> dict[str, Any]:
    quantized = {"general.quantization_version": GGML_QUANT_VERSION, "general.file_type": int(GGUF_TYPES[gguf_type][1])}
    of_base = {"general.base_model.count": 1, "general.base_model.0.name": base} if base else {}
    return {"general.type": "model", "general.name": name} | of_base | quantized


def _add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)


def _write(writer: GGUFWriter, content: _Content) -> None:
    # The header, with every tensor's shape and size, comes first, so that tensors can follow one at a time.
    for name, place in content.places.items():
        values, size = GGML_QUANT_SIZES[content.types[name]]
        shape = (*place.shape[:-1], place.shape[-1] // values * size)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), content.types[name])
    for name, tensor in content.extra.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, packed, place in _tensors(content):
        if place.heads:  # back to GGUF's order of rows; no block spans two rows
            order = half_split(place.shape[0], place.heads)
            packed = packed.reshape(place.shape[0], -1)[np.argsort(order)]
        writer.write_tensor_data(np.ascontiguousarray(packed))
    for tensor in content.extra.values():
        writer.write_tensor_data(tensor)


def _tensors(content: _Content) -> Iterator[tuple[str, np.ndarray, Place]]:
    """(GGUF name, its rows as bytes in Hugging Face's order, place); one layer's values at a time are on the host."""
    for name, place in content.places.items():
        values = np.asarray(content.leaves[place.path][place.layer])
        if place.path.endswith("/kernel"):
            values = np.ascontiguousarray(values.swapaxes(-1, -2))
        described = f"{place.key.numbered(place.key.template, (*place.layer, '*'))} ({name})"
        yield name, _packed(values, content.types[name], place.plus_one, described), place


def _packed(values: np.ndarray, kind: GGMLQuantizationType, plus_one: bool, name: str) -> np.ndarray:
    """uint8 [..., bytes of a row] of float [..., row]."""
    if kind == GGMLQuantizationType.BF16:
        return finite_cast(values, ml_dtypes.bfloat16, name).view(np.uint8)
    if kind == _F16:
        return finite_cast(values, np.float16, name).view(np.uint8)
    values = finite_cast(values, np.float32, name)
    if kind == _F32:
        return (values + np.float32(1) if plus_one else values).view(np.uint8)
    finite_cast(np.abs(values).max(keepdims=True) / 127, np.float16, f"{name} as Q8_0")  # a block's scale is float16
    # Blocks of values this small become zeros in any case, and their inverse scale would overflow in `quantize`.
    return quantize(np.where(np.abs(values) < 1e-30, np.float32(0), values), kind)


def _verify(path: Path, content: _Content, metadata: Mapping[str, Any]) -> None:
    reader = GGUFReader(path)
    expected = {name for place in content.places.values() for name in place.hf_names()}
    if reader.names() != expected:
        raise OSError(f"{path}: holds other tensors than were written: {sorted(reader.names() ^ expected)[:9]}")
    keys, stored = read_header(path)
    for key, value in metadata.items():
        if keys[key] != (float(np.float32(value)) if isinstance(value, float) else value):
            raise OSError(f"{path}: {key} does not read back as it was written; check the disk")
    for name, values in content.extra.items():
        if stored[name].raw.tobytes() != values.tobytes():
            raise OSError(f"{path}: {name} does not read back as it was written; check the disk")
    for name, packed, place in _tensors(content):
        names = place.hf_names()
        for hf_name, part in zip(names, packed if place.split else [packed]):
            values = dequantize(part, content.types[name])
            values = values - np.float32(1) if place.plus_one else values
            if not np.array_equal(reader.read(hf_name), values.T if place.flipped else values):
                raise OSError(f"{path}: {hf_name} does not read back as it was written; check the disk")


@contextlib.contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """`atomic.new_file` for an `out` that must not exist."""
    out = out.resolve()
    if out.exists():
        raise UserError(f"{out}: exists already; name another file or remove it first")
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(atomic.new_file(out))
            temporary.touch()
        except OSError as error:
            raise UserError(f"{out}: cannot be created ({error}); name a file that can be written") from error
        yield temporary
