"""The header of a GGUF file: its key/value metadata, and where its tensors lie.

The `gguf` library's own reader spends 2 s making a NumPy view of every token of a 50k vocabulary, so the header is
parsed here, after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Both the weights and the tokenizer are
read from it.

The layout, little-endian: "GGUF", version (uint32), number of tensors and of keys (uint64 each); the keys, each a
string, a type (uint32) and a value; for each tensor its name, number of dimensions, sides, type and offset; padding to
`general.alignment`; the tensors. A string is its length in bytes (uint64) and its UTF-8.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ftjax.errors import UserError

# The types of values in the metadata, by number, as `struct` names them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_INT = 2**31 - 1


class Tensor(NamedTuple):
    """A tensor of the file; `raw` becomes float32 [*shape] by `gguf.quants.dequantize`."""

    shape: tuple[int, ...]  # the slowest dimension first, the reverse of GGUF's order
    kind: GGMLQuantizationType
    raw: np.ndarray  # uint8[..., bytes of a row], mapped from the file


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({key: value}, {GGUF name: tensor}) of a file; the tensors' values are mapped into memory, not read.

    Raises UserError for a file that is damaged, big-endian, one part of several, or of an unknown quantization.
    """
    try:
        stat = path.stat()
        metadata, tensors = _read(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a valid GGUF file ({error}); download it again") from error
    return dict(metadata), dict(tensors)


# A model's weights and its tokenizer are read one after the other, and a vocabulary takes a third of a second.
@functools.lru_cache(maxsize=1)
def _read(path: Path, version: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """version: by which a file that was written anew is another one."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Header(data).read()


class _Header:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.data[:4] != b"GGUF":
            raise ValueError("does not begin with GGUF")
        self.position = 4
        version, tensors, keys = self.numbers("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format, known are 2 and 3, little-endian")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"duplicate key {key!r}")
            (kind,) = self.numbers("I")
            metadata[key] = self.value(kind)
        if metadata.get("split.count", 1) != 1:
            raise ValueError("one part of several; join them with `llama-gguf-split --merge`")
        infos = [self.tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.position // alignment) * alignment
        named = {name: self.tensor(name, start + offset, shape, kind) for name, shape, kind, offset in infos}
        if len(named) != len(infos):
            raise ValueError("two tensors of the same name")
        # `gguf` lacks dequantization for some types; found out here, before the first tensor is read.
        for kind in {tensor.kind for tensor in named.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise ValueError(f"holds tensors of type {kind.name}, which cannot be dequantized") from None
        return metadata, named

    def numbers(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.position)
        begin = self.position + 8
        if begin + length > len(self.data):  # a slice of the map would end early without an error
            raise ValueError("ends inside its header")
        self.position = begin + length
        return self.data[begin : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown type {kind} of a value")
        inner, count = self.numbers("IQ")
        if inner in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[inner]}"))
        if inner != _STRING:
            raise ValueError(f"an array of values of type {inner}, which is not supported")
        return [self.string() for _ in range(count)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.numbers("I")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        *shape, kind, offset = self.numbers(f"{dimensions}QIQ")
        return name, tuple(reversed(shape)), kind, offset  # GGUF names the fastest dimension first

    def tensor(self, name: str, begin: int, shape: tuple[int, ...], number: int) -> Tensor:
        kind = GGMLQuantizationType(number)
        values, size = GGML_QUANT_SIZES[kind]  # of one block
        if not shape or 0 in shape or shape[-1] % values:
            raise ValueError(f"{name} has the shape {list(shape)}, which does not divide into blocks of {values}")
        row = shape[-1] // values * size
        if begin + math.prod(shape[:-1]) * row > len(self.data):
            raise ValueError(f"ends before the values of {name}")
        raw = np.frombuffer(self.data, np.uint8, math.prod(shape[:-1]) * row, begin)
        return Tensor(shape, kind, raw.reshape(*shape[:-1], row))


class Fields:
    """Typed access to the metadata of one architecture; UserError names the file and the key."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        self.path, self.metadata, self.tensors = path, metadata, tensors
        self.architecture = metadata["general.architecture"]

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number below 2^31."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or not 0 < value <= _MAX_INT:
            raise self.error(f"{self.architecture}.{key} is {shorten(value)}, not a positive whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. Files hold float32: its shortest decimal is what the original config says (1e-05, not
        9.999999747378752e-06)."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= np.finfo(np.float32).max:
            raise self.error(f"{self.architecture}.{key} is {shorten(value)}, not a positive number")
        return float(str(np.float32(value)))

    def optional(self, key: str) -> float | None:
        """`real`, or None where the file has no such key or says 0, as some do to switch it off."""
        return self.real(key) if self.metadata.get(f"{self.architecture}.{key}") not in (None, 0) else None

    def window(self, key: str) -> int | None:
        """`whole`, or None where the file has no such key or says 0."""
        return None if self.metadata.get(f"{self.architecture}.{key}") in (None, 0) else self.whole(key)

    def vector(self, name: str, size: int) -> np.ndarray:
        """float32 [size], a small tensor."""
        if name not in self.tensors or self.tensors[name].shape != (size,):
            shape = list(self.tensors[name].shape) if name in self.tensors else "missing"
            raise self.error(f"{name} is {shape}, by the metadata it has the shape [{size}]")
        return dequantize(self.tensors[name].raw, self.tensors[name].kind)

    def refuse(self, *keys: str) -> None:
        """UserError where the file has one of these keys."""
        for key in keys:
            if self.has(key):
                raise self.error(f"{self.architecture}.{key} is not supported")

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}; use the safetensors of this model")


def shorten(value: Any) -> str:
    """`repr(value)` for a message, cut to 80 characters: a value may be a whole vocabulary."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
