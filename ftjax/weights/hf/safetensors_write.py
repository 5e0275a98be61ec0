"""Writing safetensors with one tensor at a time in memory, which the library's own writer does not offer.

The format: 8 bytes, little endian, the length of the header; the header, JSON of {name: {dtype, shape, data_offsets}},
padded with spaces so that the data are aligned; the data, C order, without gaps
(https://github.com/huggingface/safetensors#format).
"""

import contextlib
import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ftjax.distributed import is_first, together
from ftjax.weights.hf.keys import finite_cast
from ftjax.weights.hf.safetensors import SafetensorsFile

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write. `values` is called once, in every process; only process 0's result is used."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]  # of any floating point type: it is cast here

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Writes one file and reads it back, tensor by tensor. All processes call it; process 0 writes.

    Raises UserError for NaN, infinite or, after the cast, too large values, and OSError when a tensor reads back
    differently.
    """
    crcs = {}
    with contextlib.ExitStack() as stack:
        with together(f"opening {path}"):
            file = stack.enter_context(path.open("wb")) if is_first() else None
            if is_first():
                file.write(_header(tensors))
        for tensor in tensors:
            values = tensor.values()
            with together(f"writing {path}"):
                if is_first():
                    raw = _raw(tensor, values)
                    crcs[tensor.name] = zlib.crc32(raw)
                    file.write(raw)
            del values  # before the next tensor is gathered
        with together(f"closing {path}"):
            stack.close()
    with together(f"reading {path} back"):
        if is_first():
            _verify(path, tensors, crcs)


def shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """The tensors cut, in order, into runs of at most `limit` bytes; a larger one has a run to itself."""
    runs, room = [], 0
    for tensor in tensors:
        if not runs or tensor.nbytes > room:
            runs.append([])
            room = limit
        runs[-1].append(tensor)
        room -= tensor.nbytes
    return runs


def _header(tensors: Sequence[Tensor]) -> bytes:
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        end = start + tensor.nbytes
        kind = _TYPES[tensor.dtype.name]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor, values: np.ndarray) -> memoryview:
    cast = np.asarray(finite_cast(values, tensor.dtype, tensor.name), order="C")
    if cast.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has the shape {cast.shape}, not {tensor.shape}")
    return memoryview(cast.reshape(-1).view(np.uint8))


def _verify(path: Path, tensors: Sequence[Tensor], crcs: dict[str, int]) -> None:
    stored = SafetensorsFile(path)
    if stored.names() != crcs.keys():
        raise OSError(f"{path}: holds other tensors than were written; check the disk")
    for tensor in tensors:
        values = stored.read(tensor.name)
        written = (tensor.shape, tensor.dtype, crcs[tensor.name])
        if (values.shape, values.dtype, zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8))) != written:
            raise OSError(f"{path}: {tensor.name} does not read back as it was written; check the disk")
