"""Whole models and adapters on disk, as an export leaves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ftjax import tree
from ftjax.distributed import together
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree
from ftjax.weights.hf.together import new_directory_together
from ftjax.weights.hf.write import write_model


def write_merged(
    out: Path,
    params: Tree,
    spec: DecoderSpec,
    config: dict[str, Any],
    save_tokenizer: Callable[[Path], None],
    **options,
) -> None:
    """A new directory `out` with a whole model, and the tokenizer that `save_tokenizer` saves there, as an export does.

    options: of `write_model`.
    """
    with new_directory_together(out) as directory:
        write_model(directory, params, spec, config, **options)
        with together(f"writing {directory}"):
            if jax.process_index() == 0:
                save_tokenizer(directory)


def with_scale(matrices: Tree, scaling: float) -> Tree:
    """Completes a tree of `lora_a` and `lora_b` alone with its `lora_scale` leaves."""
    leaves = tree.flatten(matrices)
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        leaves[path.replace("/lora_a", "/lora_scale")] = jnp.full(leaves[path].shape[:-2], scaling, jnp.float32)
    return tree.unflatten(leaves)


def files(directory: Path) -> set[str]:
    """The names of what is in an export."""
    return {path.name for path in directory.iterdir()}


def parity_of(path: Path) -> dict:
    """What a parity.json says."""
    return json.loads(path.read_text())
