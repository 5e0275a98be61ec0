"""The header of a GGUF file: its key/value metadata, and where its tensors lie.

The `gguf` library's own reader spends 2 s making a NumPy view of every token of a 50k vocabulary, so the header is
parsed here, after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The weights and the tokenizer share it.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ftjax.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    raw: np.ndarray  # uint8[..., bytes of a row], mapped from the file


def parse(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({key: value}, {GGUF name: tensor}) of a file; nothing beyond the header is read.

    Raises UserError for a file that is damaged, big-endian, one part of several, or of an unknown quantisation.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Header(data).parse()
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a valid GGUF file ({error}); download it again") from error


class _Header:
    """A cursor over the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.data[:4] != b"GGUF":
            raise ValueError("does not begin with GGUF")
        self.at = 4
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
        start = -(-self.at // alignment) * alignment
        named = {name: self.tensor(name, start + offset, shape, kind) for name, shape, kind, offset in infos}
        if len(named) != len(infos):
            raise ValueError("two tensors of the same name")
        for kind in {tensor.kind for tensor in named.values()}:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise ValueError(f"holds tensors of type {kind.name}, which cannot be dequantised") from None
        return metadata, named

    def numbers(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        found = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        begin = self.at + 8
        if begin + length > len(self.data):
            raise ValueError("ends inside its header")
        self.at = begin + length
        return self.data[begin : self.at].decode()

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
            raise ValueError(
                f"{name} has the shape {list(shape)}, which does not divide into blocks of {values}"
            )
        row = shape[-1] // values * size
        if begin + math.prod(shape[:-1]) * row > len(self.data):
            raise ValueError(f"ends before the values of {name}")
        raw = np.frombuffer(self.data, np.uint8, math.prod(shape[:-1]) * row, begin)
        return Tensor(shape, kind, raw.reshape(*shape[:-1], row))
