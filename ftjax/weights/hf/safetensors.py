"""Hugging Face model directories: `config.json` and safetensors, validated before any tensor is read.

The `safetensors` library rejects truncated files, trailing bytes, holes, overlaps, deep JSON and shapes that do not
fit their bytes. It accepts a tensor named twice in the header, which is therefore checked here, and needs 14 times a
header's size in memory, which is therefore bounded here. Tensors are read by position and not through its memory map,
whose pages count as this process's memory for as long as the file is open.
"""

import json
import math
import os
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ftjax import strict_json
from ftjax.errors import UserError
from ftjax.weights.hf.files import MAX_JSON_BYTES, inside, read_json

PICKLES = (".bin", ".pt", ".pth", ".pkl")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Gaps between two parts up to this many bytes are read too: a second system call would take longer, and storage reads
# whole pages of 4 KiB anyway.
_GAP = 1024
_IOV_MAX = 1024  # the most buffers that one preadv call fills (Linux)


class _Entry(NamedTuple):
    """A tensor's entry in the header."""

    kind: str  # a key of _DTYPES, or a type that is not supported
    shape: tuple[int, ...]
    begin: int  # in bytes after the header


class SafetensorsFile:
    """One open safetensors file; UserError when it is malformed. Tensors are read by `read` alone."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._entries, self._start = self._header()
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a valid safetensors file ({error}); download or write it again") from error

    def _header(self) -> tuple[dict[str, _Entry], int]:
        """(entries by name, position of the first tensor's first byte). Raises what `__init__` catches."""
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"header too large: {length} bytes, over the limit of {MAX_JSON_BYTES}")
        with safe_open(self.path, framework="numpy"):
            pass  # opening validates: an error means that the file is malformed
        header = json.loads(os.pread(self._file, length, 8).decode(), object_pairs_hook=_entry)
        return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        kind = self._entries[name].kind
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: {name} has the type {kind}, which is not supported; convert it to BF16")
        return np.dtype(_DTYPES[kind])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects, one slice (of step 1) per leading dimension."""
        entry, dtype = self._entries[name], self.dtype(name)
        bounds = [part.indices(size) for part, size in zip(index, entry.shape)]
        if len(index) > len(entry.shape) or any(step != 1 for _, _, step in bounds):
            raise ValueError(f"{index} does not select a part of {name} {list(entry.shape)}")
        bounds += [(0, size, 1) for size in entry.shape[len(index) :]]
        out = np.empty([max(0, stop - start) for start, stop, _ in bounds], dtype)
        if out.size:
            offsets, run = _runs(entry.shape, [(start, stop) for start, stop, _ in bounds])
            begin = self._start + entry.begin
            self._fill(out, begin + offsets * dtype.itemsize, run * dtype.itemsize)
        return out

    def _fill(self, out: np.ndarray, offsets: np.ndarray, run: int) -> None:
        """Reads `run` bytes at each of the ascending `offsets` into `out`, where they follow one another.

        Runs with small gaps are collected for one `preadv`, which scatters the file's bytes over the buffers in order;
        the gaps go to a buffer that nobody reads.
        """
        free = memoryview(out.reshape(-1).view(np.uint8))  # the part of `out` that is not yet assigned to a run
        discarded = memoryview(bytearray(_GAP))
        buffers: list[memoryview] = []
        first = end = int(offsets[0])
        for offset in offsets.tolist():
            if offset - end > _GAP or len(buffers) > _IOV_MAX - 2:
                self._read_at(first, buffers)
                buffers, first, end = [], offset, offset
            if offset > end:
                buffers.append(discarded[: offset - end])
            buffers.append(free[:run])
            free, end = free[run:], offset + run
        self._read_at(first, buffers)

    def _read_at(self, offset: int, buffers: list[memoryview]) -> None:
        while buffers:  # preadv may return early, in the middle of a buffer
            count = os.preadv(self._file, buffers, offset)
            if not count:
                raise UserError(f"{self.path}: has become shorter since it was opened; download it again")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][count:]


def _entry(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    """An `object_pairs_hook` for headers: a tensor's description becomes an _Entry, a fifth of the dict's size."""
    fields = strict_json.unique(pairs)
    kind, shape, offsets = (fields.get(name) for name in ("dtype", "shape", "data_offsets"))
    if isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list):
        return _Entry(sys.intern(kind), tuple(shape), offsets[0])
    return fields


def _runs(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Where the part `bounds` of a row-major array of `shape` lies: (int64 offsets of runs, length of each run).

    Both are in elements. Dimensions after the last one that is cut are read whole, so one run covers them and the
    selected part of the cut dimension; each index of the dimensions before it begins a run of its own.
    """
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    cut = max((i for i, (low, high) in enumerate(bounds) if high - low < shape[i]), default=-1)
    if cut < 0:
        return np.zeros(1, np.int64), math.prod(shape)
    offsets = np.full(1, bounds[cut][0] * strides[cut], np.int64)
    for (low, high), stride in reversed(list(zip(bounds, strides))[:cut]):
        offsets = np.add.outer(np.arange(low, high) * stride, offsets).reshape(-1)
    return offsets, (bounds[cut][1] - bounds[cut][0]) * strides[cut]


class SafetensorsReader:
    """A directory with config.json and model.safetensors, or shards named by model.safetensors.index.json.

    `config` is the content of config.json, with the end tokens of `generation_config.json` added to its `eos_token_id`.
    `shape`, `dtype` and `read` raise KeyError for a name that is not in `names()`. weights: False reads the config
    alone; there are then no names.
    """

    def __init__(self, path: Path, weights: bool = True):
        self.path = path
        self.config = _with_all_end_tokens(read_json(inside(path, "config.json")), path)
        self._files: dict[str, SafetensorsFile] = {}
        if not weights:
            return
        index = inside(path, "model.safetensors.index.json")
        if index.is_file():
            self._open_shards(index)
        elif (single := inside(path, "model.safetensors")).is_file():
            file = SafetensorsFile(single)
            self._files = dict.fromkeys(file.names(), file)
        else:
            raise _no_weights(path)

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: lacks `weight_map`, an object of tensor names to file names; download it again")
        if unprintable := [name for name in weight_map if not name.isprintable()]:
            raise UserError(f"{index}: {unprintable[0]!r} is not the name of a tensor; download it again")
        shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            if not shard.endswith(".safetensors"):
                raise UserError(f"{index}: refers to {shard!r}; only .safetensors files are read")
            path = inside(self.path, shard)
            if not path.is_file():
                raise UserError(f"{index}: the shard {shard} is missing from {self.path}; finish the download")
            shards[shard] = SafetensorsFile(path)
        stored = {(name, shard) for shard, file in shards.items() for name in file.names()}
        if wrong := sorted(stored ^ set(weight_map.items())):
            lines = [f"  {name} ({'absent from' if (name, s) not in stored else 'only in'} {s})" for name, s in wrong]
            raise UserError("\n".join([f"{index}: index and shards differ; download both again:", *lines]))
        self._files = {name: shards[shard] for name, shard in weight_map.items()}

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects; only its bytes are read."""
        return self._files[name].read(name, index)


def _with_all_end_tokens(config: dict[str, Any], path: Path) -> dict[str, Any]:
    # Chat models often name their end-of-turn token in generation_config.json alone.
    further = inside(path, "generation_config.json")
    if not further.is_file():
        return config
    ends: list[int] = []
    for value in (config.get("eos_token_id"), read_json(further).get("eos_token_id")):
        values = value if isinstance(value, list) else [] if value is None else [value]
        ends += [end for end in values if end not in ends]
    return config | {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else config


def _no_weights(path: Path) -> UserError:
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        return UserError(
            f"{path}: has weights only as pickles ({', '.join(pickles)}), which can run code and are never "
            "opened; convert them to safetensors first (`save_pretrained` of transformers does)"
        )
    return UserError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
