"""Hugging Face model directories: `config.json` and safetensors, validated before any tensor is read.

The `safetensors` library rejects truncated files, trailing bytes, holes, overlaps, headers over 100 MB, deep
JSON and shapes that do not fit their bytes. It accepts a tensor named twice in the header, which is therefore
checked here.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ftjax.errors import UserError
from ftjax.weights.files import inside, read_json, unique

_PICKLES = (".bin", ".pt", ".pth", ".pkl")
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


class SafetensorsFile:
    """One memory-mapped safetensors file; UserError when it is malformed. Reads only what `read` asks for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
            with open(path, "rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            # Inner objects are dropped as they are read, so that a header of 100 MB does not become a
            # gigabyte.
            json.loads(header, object_pairs_hook=lambda pairs: unique(pairs) and None)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a valid safetensors file ({error}); download or write it again"
            ) from error
        self._names = set(self._file.keys())

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise UserError(
                f"{self.path}: {name} has the type {kind}, which is not supported; convert it to BF16"
            )
        return np.dtype(_DTYPES[kind])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects, one slice per leading dimension; nothing is kept."""
        return self._file.get_slice(name)[index] if index else self._file.get_tensor(name)


class SafetensorsReader:
    """A directory with config.json and model.safetensors, or shards named by model.safetensors.index.json.

    `config` is the content of config.json, its `eos_token_id` joined by the further end tokens that
    `generation_config.json` names. `shape`, `dtype` and `read` raise KeyError for a name that is not in
    `names()`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _with_all_end_tokens(read_json(inside(path, "config.json")), path)
        self._files: dict[str, SafetensorsFile] = {}
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
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise UserError(
                f"{index}: lacks `weight_map`, an object of tensor names to file names; download it again"
            )
        shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            if not shard.endswith(".safetensors"):
                raise UserError(f"{index}: refers to {shard!r}; only .safetensors files are read")
            path = inside(self.path, shard)
            if not path.is_file():
                raise UserError(
                    f"{index}: the shard {shard} is missing from {self.path}; finish the download"
                )
            shards[shard] = SafetensorsFile(path)
        stored = {(name, shard) for shard, file in shards.items() for name in file.names()}
        if wrong := sorted(stored ^ set(weight_map.items())):
            lines = [
                f"  {name} ({'absent from' if (name, s) not in stored else 'only in'} {s})"
                for name, s in wrong
            ]
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
    # Chat models often name their end of turn in generation_config.json alone.
    further = inside(path, "generation_config.json")
    if not further.is_file():
        return config
    ends: list[int] = []
    for value in (config.get("eos_token_id"), read_json(further).get("eos_token_id")):
        values = value if isinstance(value, list) else [] if value is None else [value]
        ends += [end for end in values if end not in ends]
    return config if len(ends) < 2 else config | {"eos_token_id": ends}


def _no_weights(path: Path) -> UserError:
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES):
        return UserError(
            f"{path}: only has weights as pickles ({', '.join(pickles)}), which can run code and are never "
            "opened; convert them to safetensors first (`save_pretrained` of transformers does)"
        )
    return UserError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
