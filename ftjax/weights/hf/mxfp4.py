"""MXFP4 (OpenAI's GPT-OSS), read as bfloat16.

The format (OCP Microscaling Formats v1.0, 5.3.3 and 5.4.1): 32 numbers of 4 bits (E2M1), two to a byte, low half first,
are multiplied by one power of two (E8M0).
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ftjax.errors import UserError
from ftjax.weights.hf.safetensors import SafetensorsReader

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4Reader:
    """A reader in which NAME_blocks and NAME_scales are one tensor NAME, in bfloat16.

    NAME_blocks uint8 [experts, out, in / 32, 16] and NAME_scales uint8 [experts, out, in / 32] are NAME
    [experts, in, out]. Other tensors are as they are. UserError when the two do not fit each other.
    """

    def __init__(self, reader: SafetensorsReader):
        self.path: Path = reader.path
        self.config: dict[str, Any] = reader.config
        self._reader = reader
        stored = reader.names()
        bases = (name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS))
        self._packed = {name: self._shape(name) for name in bases if name + _SCALES in stored}
        if duplicates := sorted(self._packed.keys() & stored):
            raise UserError(
                f"{self.path}: {', '.join(duplicates)}: there both in MXFP4 and otherwise; remove one of them"
            )
        self._names = stored - {name + part for name in self._packed for part in (_BLOCKS, _SCALES)} | set(self._packed)

    def _shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = self._reader.shape(name + _BLOCKS), self._reader.shape(name + _SCALES)
        kinds = {self._reader.dtype(name + part).name for part in (_BLOCKS, _SCALES)}
        if kinds != {"uint8"} or len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
            raise UserError(
                f"{self.path}: {name + _BLOCKS} {list(blocks)} and {name + _SCALES} {list(scales)} are not MXFP4, "
                "uint8 [experts, out, in / 32, 16] and uint8 [experts, out, in / 32]; get the weights again"
            )
        return blocks[0], blocks[2] * 32, blocks[1]

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name] if name in self._packed else self._reader.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self._packed else self._reader.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects; only the blocks that it touches are read and dequantized."""
        if name not in self._packed:
            return self._reader.read(name, index)
        index = (*index, *[slice(None)] * (3 - len(index)))
        experts, (first, last, _), out = index[0], index[1].indices(self._packed[name][1]), index[2]
        groups = slice(first // 32, -(-last // 32))
        blocks = self._reader.read(name + _BLOCKS, (experts, out, groups))
        scales = self._reader.read(name + _SCALES, (experts, out, groups))
        skipped = first - 32 * groups.start
        return dequantize(blocks, scales)[:, :, skipped : skipped + last - first].swapaxes(1, 2)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [..., G * 32] from uint8 [..., G, 16] and uint8 [..., G]; a scale of 255 makes NaN."""
    pairs = np.take(_PAIRS, scales[..., None].astype(np.uint16) << 8 | blocks)
    return pairs.view(ml_dtypes.bfloat16).reshape(*scales.shape[:-1], -1)


def _pairs() -> np.ndarray:
    """uint32 [scale * 256 + byte]: the two bfloat16 values of a byte, exactly, the low half's first."""
    powers = np.ldexp(np.float32(1), np.arange(-127, 128))
    powers = np.append(powers, np.float32(np.nan))
    values = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1)
    with np.errstate(over="ignore"):  # 4 * 2^127 is infinite, for transformers too
        return (powers[:, None, None] * values).astype(ml_dtypes.bfloat16).reshape(-1, 2).view(np.uint32).reshape(-1)


_PAIRS = _pairs()
