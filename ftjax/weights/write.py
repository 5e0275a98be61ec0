"""Fine-tuned parameters as a Hugging Face model directory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ftjax import tree
from ftjax.models.families import spec_from_config
from ftjax.models.spec import DecoderSpec
from ftjax.weights.files import new_directory
from ftjax.weights.keys import finite_cast, hf_names
from ftjax.weights.safetensors import SafetensorsReader

# Other places for what is written here, and things that do not hold for the weights that are written.
_DROPPED = ("torch_dtype", "_name_or_path", "auto_map", "quantization_config")


def write_merged(
    out: Path,
    params: dict[str, Any],
    spec: DecoderSpec,
    config: dict[str, Any],
    save_tokenizer: Callable[[Path], None],
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `out`: config.json, generation_config.json, safetensors (sharded beyond the limit), tokenizer.

    `params` is the whole tree, of jax or NumPy arrays that this process holds all of; `config` the Hugging
    Face config they were loaded with; `dtype` None keeps each array's own. `save_tokenizer` is called with
    the directory to save into. All is written to a temporary sibling, read back, compared bit by bit, synced
    and then renamed.

    Raises UserError when `out` exists and is not an empty directory, and for NaN, infinite or, after a cast,
    too large values; ValueError when `params` or `config` do not belong to `spec`.
    """
    with new_directory(out) as directory:
        _write_tensors(directory, params, spec, dtype, max_shard_bytes)
        embedding = np.dtype(dtype or tree.flatten(params)["embed_tokens/embedding"].dtype)
        config = {key: value for key, value in config.items() if key not in _DROPPED}
        config |= {"dtype": embedding.name, "tie_word_embeddings": spec.tie_word_embeddings}
        write_json(directory / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        write_json(directory / "generation_config.json", ids)
        save_tokenizer(directory)
        _verify(directory, params, spec, dtype)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit (-0.0 is not 0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _tensors(params: dict[str, Any], spec: DecoderSpec, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array), one stacked parameter after the other: one at a time is on the host."""
    keys = hf_names(spec)
    leaves = tree.flatten(params)
    if {path: leaf.shape for path, leaf in leaves.items()} != {path: key.our_shape for path, key in keys.items()}:
        raise ValueError(f"the parameters to write are not those of {spec}")
    for path, leaf in leaves.items():
        key = keys[path]
        values = np.asarray(leaf)
        for place in key.places():
            name = key.name(place)
            part = finite_cast(values[place], dtype or values.dtype, name)
            yield name, np.ascontiguousarray(part.T if key.transposed else part)


def _write_tensors(
    directory: Path, params: dict[str, Any], spec: DecoderSpec, dtype: Any, max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []  # the names in each file; the files are numbered when their count is known
    total = 0
    waiting: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(waiting, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, values in _tensors(params, spec, dtype):
        if waiting and sum(array.nbytes for array in waiting.values()) + values.nbytes > max_shard_bytes:
            flush()
        waiting[name] = values
        total += values.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _verify(directory: Path, params: dict[str, Any], spec: DecoderSpec, dtype: Any) -> None:
    reader = SafetensorsReader(directory)
    if spec_from_config(reader.config) != spec:
        raise ValueError(
            f"the config to write describes {spec_from_config(reader.config)}, the parameters {spec}"
        )
    remaining = reader.names()
    for name, values in _tensors(params, spec, dtype):
        if name not in remaining or not same_bits(reader.read(name), values):
            raise OSError(f"{directory}: {name} does not read back as it was written; check the disk")
        remaining.discard(name)
    if remaining:
        raise OSError(f"{directory}: unexpected tensors {sorted(remaining)}")
