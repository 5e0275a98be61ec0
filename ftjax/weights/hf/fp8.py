"""Blocks of FP8 (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2), read as bfloat16.

A matrix of E4M3 numbers has a float32 factor for each of its blocks, of 128 rows and columns as a rule; the last of a
row or column may be cut.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.errors import UserError
from ftjax.weights.hf.safetensors import SafetensorsReader

_SCALES = "_scale_inv"
_FLOATS = ("float32", "bfloat16")  # of the factors


class FP8Reader:
    """A reader in which NAME and NAME_scale_inv are one tensor NAME, in bfloat16.

    NAME float8_e4m3fn [out, in] and NAME_scale_inv [ceil(out / block), ceil(in / block)] are NAME [out, in]. Other
    tensors are as they are. UserError when the two do not fit each other.
    """

    def __init__(self, reader: SafetensorsReader, block: tuple[int, int]):
        self.path: Path = reader.path
        self.config: dict[str, Any] = reader.config
        self._reader, self._block = reader, block
        stored = reader.names()
        bases = (name.removesuffix(_SCALES) for name in stored if name.endswith(_SCALES))
        self._packed = {name for name in bases if name in stored}
        self._names = stored - {name + _SCALES for name in self._packed}
        for name in sorted(self._packed):
            self._check(name)

    def _check(self, name: str) -> None:
        shape, scales = self._reader.shape(name), self._reader.shape(name + _SCALES)
        kinds = self._reader.dtype(name).name, self._reader.dtype(name + _SCALES).name
        expected = tuple(-(-size // side) for size, side in zip(shape, self._block))
        if kinds[0] != "float8_e4m3fn" or kinds[1] not in _FLOATS or len(shape) != 2 or scales != expected:
            raise UserError(
                f"{self.path}: {name} {list(shape)} of {kinds[0]} and {name + _SCALES} {list(scales)} of {kinds[1]} "
                f"are not FP8 in blocks of {list(self._block)}, as quantization_config says; get the weights again"
            )

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self._packed else self._reader.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects; only that and the factors of its blocks are read."""
        if name not in self._packed:
            return self._reader.read(name, index)
        shape = self._reader.shape(name)
        bounds = [part.indices(size)[:2] for part, size in zip((*index, *[slice(None)] * (2 - len(index))), shape)]
        blocks = [slice(first // side, -(-last // side)) for (first, last), side in zip(bounds, self._block)]
        scales = self._reader.read(name + _SCALES, tuple(blocks)).astype(np.float32)
        for axis, ((first, last), side, its) in enumerate(zip(bounds, self._block, blocks)):
            scales = np.take(scales, np.arange(first, last) // side - its.start, axis=axis)
        values = self._reader.read(name, tuple(slice(*bound) for bound in bounds))
        return (values.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
