"""From config sections to the objects that the command lines share: the base model, and variables with adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from ftjax import config as configs
from ftjax import lora, optim, sharding, tree
from ftjax.checkpoint import Checkpoints
from ftjax.data import tokenizer as tokenizers
from ftjax.models import params
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.state import abstract_state
from ftjax.tree import Tree
from ftjax.weights.load import load_params
from ftjax.weights.source import Reader, locate, open_source


class Base(NamedTuple):
    """A pretrained model that is described but not yet read."""

    source: str  # as the user named it
    path: Path
    reader: Reader  # its weights on disk, and its Hugging Face config
    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    end_tokens: tuple[int, ...]  # generation stops at any of them


def open_base(config: ConfigDict) -> Base:
    """Finds and describes `config.source`; reads headers and the tokenizer only."""
    path = locate(config.source)
    reader = open_source(path)
    spec = spec_from_config(reader.config)
    tokenizer = tokenizers.load(path)
    tokenizers.check_vocab(tokenizer, spec.vocab_size)
    model = Decoder(spec, jnp.dtype(config.dtype), jnp.dtype(config.param_dtype), config.remat)
    return Base(config.source, path, reader, model, tokenizer, tokenizers.end_tokens(tokenizer, reader.config))


def abstract_variables(config: ConfigDict, model: Decoder, mesh: Mesh) -> tuple[Tree, Callable[[str], bool]]:
    """({"params", "lora"?} as ShapeDtypeStructs with shardings, and which of their paths training differentiates).

    config.adapter decides both. What is trained is kept in float32: an update of 1e-5 of a weight is lost in bfloat16.
    """
    leaves = tree.flatten(params.abstract_params(model, mesh))
    if config.adapter.kind == "lora":
        targets = lora.find_targets(config.adapter.targets, lora.linear_kernels(leaves))
        adapters = lora.abstract_adapters(
            tree.unflatten(leaves), params.logical_axes(model), targets, config.adapter.rank, mesh
        )
        return {"params": tree.unflatten(leaves), "lora": adapters}, lambda path: bool(lora.TRAINABLE.match(path))
    trained = set(tree.matching(config.adapter.trainable, list(leaves), "adapter.trainable"))
    for path in trained:
        leaf = leaves[path]
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    return {"params": tree.unflatten(leaves)}, lambda path: path.removeprefix("params/") in trained


def load_variables(config: ConfigDict, base: Base, abstract: Tree) -> Tree:
    """The base's weights, and fresh adapters where `abstract` has any, each placed by its sharding."""
    variables = {"params": load_params(base.reader, base.model.spec, abstract["params"])}
    if "lora" in abstract:
        scaling = lora.scale(config.adapter.rank, config.adapter.alpha, config.adapter.rslora)
        variables["lora"] = lora.init_adapters(abstract["lora"], config.seed, scaling)
    return variables


def load_run(workdir: Path, step: int | None = None) -> tuple[ConfigDict, Base, Tree, int]:
    """A run's (config, base, variables, step) from its checkpoint `step`, by default the newest.

    The mesh is this machine's, not the run's. Raises UserError where `workdir` holds no run or no such step.
    """
    config = configs.read(workdir / "config.json")
    base = open_base(config.model)
    mesh = sharding.make_mesh({"fsdp": -1})
    with jax.set_mesh(mesh):
        abstract, is_trained = abstract_variables(config, base.model, mesh)
        trainable, _ = tree.partition(abstract, is_trained)
        # The learning rate does not matter here: only the structure of the optimizer's state does.
        optimizer = optim.make_optimizer(config.optimizer, optim.make_schedule(1.0, config.schedule, 1))
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            step, state, _ = checkpoints.restore(abstract_state(optimizer, trainable, mesh), step)
        _, frozen = tree.partition(load_variables(config, base, abstract), is_trained)
        return config, base, tree.combine(state.trainable, frozen), step
