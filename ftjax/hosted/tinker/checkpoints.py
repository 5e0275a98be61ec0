"""A model in training as files: its adapter as PEFT has it, and for going on every bit of it and of the optimizer."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax import atomic, tree
from ftjax.hosted.tinker.training import Learner, Moments, Programs, Shape
from ftjax.strict_json import loads
from ftjax.tree import Tree
from ftjax.weights.hf.safetensors import SafetensorsFile
from ftjax.weights.hf.safetensors_write import Tensor, write_safetensors
from ftjax.weights.peft.adapter import BaseFacts, write_adapter

ADAPTER, STATE, FACTS = "adapter", "state.safetensors", "state.json"


def save_adapter(out: Path, learner: Learner, facts: BaseFacts) -> None:
    """Writes `out`/adapter, which peft and the engine read."""
    with atomic.new_directory(out) as directory:
        write_adapter(directory / ADAPTER, learner.adapter, learner.programs.base.model.spec, facts)


def save_state(out: Path, learner: Learner, facts: BaseFacts) -> None:
    """Writes `out` with all that `load_state` reads, and the adapter."""
    parts = {"adapter": learner.adapter, "mean": learner.moments.mean, "square": learner.moments.square}
    with atomic.new_directory(out) as directory:
        write_adapter(directory / ADAPTER, learner.adapter, learner.programs.base.model.spec, facts)
        write_safetensors(directory / STATE, [_tensor(path, leaf) for path, leaf in tree.flatten(parts).items()])
        said = {"version": 1, "steps": learner.moments.steps, "shape": learner.shape._asdict()}
        (directory / FACTS).write_text(json.dumps(said))


def load_state(path: Path, programs: Programs, optimizer: bool) -> Learner:
    """What `save_state` wrote, with the optimizer's moments or without."""
    said: dict[str, Any] = loads((path / FACTS).read_text())
    shape, stored = Shape(**said["shape"]), SafetensorsFile(path / STATE)
    abstract = programs.abstract(shape)

    def read(part: str, like: Tree) -> Tree:
        leaves = tree.flatten(like)
        values = {name: stored.read(f"{part}/{name}").reshape(leaf.shape) for name, leaf in leaves.items()}
        return tree.unflatten({name: jax.device_put(values[name], leaves[name].sharding) for name in leaves})

    learner = Learner(programs, shape, read("adapter", abstract))
    if optimizer:
        mean, square = (read(part, learner.trained) for part in ("mean", "square"))
        learner.moments = Moments(mean, square, said["steps"])
    return learner


def size_of(path: Path) -> int:
    """Bytes of the files below."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _tensor(name: str, leaf: jax.Array) -> Tensor:
    shape = leaf.shape or (1,)  # what is written has an axis at least
    return Tensor(name, shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf).reshape(shape))
