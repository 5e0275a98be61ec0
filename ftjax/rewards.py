"""Reward models, and what they say of conversations.

model = rewards.load("runs/reward")  # a run, an exported directory, or a SEQ_CLS adapter of peft's
model.scores([[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], ("2 + 2?", "5")])
"""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, origin, sharding
from ftjax import config as configs
from ftjax.adapted import NONE, load_model
from ftjax.assemble import Base
from ftjax.config_checks import is_endpoint
from ftjax.data.batch.packing import BATCH, lay
from ftjax.data.format.conversation import conversation as plain_turns
from ftjax.data.format.example import Document, Row
from ftjax.data.tokens.chat import checked, tokenize_unpaired
from ftjax.data.tokens.masks import encode
from ftjax.data.tokens.rendering import render
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.likelihood import TOKENS, placed, row_length
from ftjax.memory import bytes_on_device
from ftjax.method import method_of
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.heads import COLLECTION, SCORE
from ftjax.models.params import abstract_params
from ftjax.objectives.scores import is_last, scores
from ftjax.training import digest
from ftjax.training.state import normalization
from ftjax.tree import Tree
from ftjax.weights.hf.classifier import FACTS, TEXTS
from ftjax.weights.hf.files import inside, read_json
from ftjax.weights.peft import adapter as adapters
from ftjax.weights.peft.begun_heads import classifier
from ftjax.weights.peft.config import kind_of
from ftjax.weights.source import locate, open_source

log = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]] | tuple[str, str]  # messages that end with an answer; or (prompt, answer)


class RewardModel(NamedTuple):
    """A model with one head of numbers or several, an ensemble.

    Attributes:
      base: its decoder and tokenizer.
      variables: with the heads, on one device or sharded over a mesh.
      mean, std: float64 [K], of each head's rewards over the training pairs: what `scores` are normalized with.
      label_noise: the share of labels that are given at random, as it was trained with (objective.label_noise).
      max_length: tokens of a document in training, beyond which it was cut, as here.
    """

    base: Base
    variables: Tree
    mean: np.ndarray
    std: np.ndarray
    label_noise: float
    max_length: int

    @property
    def heads(self) -> int:
        return len(self.mean)

    def scores(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """float32 [N, K]: the normalized reward of each conversation by each head, read at its last token.

        The reward of an ensemble is the mean over its heads, and their variance says how sure it is of it. Every
        process of a run calls it alike.

        Raises:
          UserError: a conversation that does not end with an answer, or that the chat template refuses.
        """
        origins = [f"conversation {i}" for i in range(len(conversations))]
        return self.scores_of([self.tokens(turns, origin=origin) for turns, origin in zip(conversations, origins)])

    def tokens(
        self, conversation: Conversation, tools: list[dict] | None = None, origin: str = "the conversation"
    ) -> np.ndarray:
        """int32 [n]: a conversation exactly as it is rendered for training, not cut. origin: for messages."""
        turns = _turns(conversation) if isinstance(conversation, tuple) else list(conversation)
        if not turns or turns[-1].get("role") != "assistant":
            raise UserError(f"{origin}: a reward is of an answer; let the conversation end with the assistant's")
        *prompt, answer = turns
        fields = {"prompt": prompt, "completion": [answer], "label": True} | ({"tools": tools} if tools else {})
        tokenizer = self.base.tokenizer
        try:
            return tokenize_unpaired(Row(fields, origin), tokenizer, self.base.model.spec.vocab_size).tokens
        except UserError:
            # Of such rows nothing could be learned, as when an answer is empty or begins with a space that the
            # tokenizer merges with the template's text. A model may write them all the same, and they have a reward.
            turns = plain_turns(prompt, f"{origin}: prompt", needs_assistant=False)
            text = render([*turns, dict(answer)], tokenizer, origin, tools)
            return checked(encode([text], tokenizer)[0], origin, tokenizer, self.base.model.spec.vocab_size)

    def scores_of(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, K], as `scores` of documents of `tokens`."""
        if cut := sum(len(document) > self.max_length for document in documents):
            log.warning(
                "%d of %d conversations have more than the %d tokens at which the reward model was trained; they are "
                "cut, as they were in training",
                *(cut, len(documents), self.max_length),
            )
        found = np.zeros((len(documents), self.heads), np.float32)
        mesh = jax.tree.leaves(self.variables)[0].sharding.mesh
        with jax.set_mesh(mesh):
            kept = [document[: self.max_length] for document in documents]
            lengths = np.array(
                [row_length(len(one), self.base.model.spec.max_position_embeddings, mesh) for one in kept]
            )
            for length in sorted(set(lengths.tolist())):
                indices = np.flatnonzero(lengths == length)
                rows = _rows(len(indices), length, sharding.row_parts(mesh))
                for start in range(0, len(indices), rows):
                    part = indices[start : start + rows]
                    each = [[Document(kept[i], np.ones(len(kept[i]), bool))] for i in part]
                    arrays = placed(lay([*each, *[[]] * (rows - len(part))], length, BATCH))
                    found[part] = jax.device_get(_at_end(self.base.model, self.variables, arrays))[: len(part)]
        return ((found - self.mean) / self.std).astype(np.float32)

    def likelihood(self, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
        """float64 [N]: p(chosen is better) as the mean of the heads has it. chosen, rejected: `scores` [N, K]."""
        difference = ((chosen.astype(np.float64) - rejected) * self.std).mean(axis=1)
        return (1 - self.label_noise) * np.exp(-np.logaddexp(0, -difference)) + self.label_noise / 2


def load(path: str, step: str | None = None, model: str = "") -> RewardModel:
    """The reward model of a run, of a directory of transformers' ...ForSequenceClassification, or of a SEQ_CLS adapter.

    step: of a run: "best", "latest" or a number, by default the best where there is one. model: where the base of a run
    or an adapter is, if not where they say. It computes as the run did, or in the type of a directory's weights.

    Raises:
      UserError: there is no such thing, or it has no head of numbers for a text.
    """
    where = Path(path).expanduser()
    if (where / "checkpoints").is_dir():
        return _of_run(where, step, model)
    if step is not None:
        raise UserError(f"{path}: is no run, and has no steps; leave the step out")
    with jax.set_mesh(sharding.make_mesh({"fsdp": -1})):  # which need not be that of a run which asks for rewards
        return _of_directory(path, model)


def needed(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> float:
    """Bytes on each device, by default of this machine, of the models that config.objective.rewards names, or judge.

    Nothing of them is read but what describes them. Raises UserError where there is no such thing.
    """
    mesh, size = sharding.make_mesh({"fsdp": -1}, devices), 0.0
    for path, named in _models(config).items():
        try:
            size += _bytes(path, mesh)
        except UserError as error:
            raise UserError(f"{named}: {error}") from error
    return size


def digests(config: ConfigDict) -> dict[str, str]:
    """{what names it in the config: sha256} of the contents of the models that `needed` counts.

    Of a run the checkpoint that it is read from counts, of an adapter its files, of a directory what `base_digest`
    reads and the head.
    """
    return {named: _digest(path) for path, named in _models(config).items()}


def _models(config: ConfigDict) -> dict[str, str]:
    """{path: what names it in the config}"""
    named = (one if isinstance(one, str) else one[0] for one in config.objective.rewards)
    kinds_and_paths = {name.partition("?")[0].partition(":")[::2] for name in named}  # however heads are taken together
    paths = sorted(path for kind, path in kinds_and_paths if kind == configs.REWARD)
    models = {path: f"config.objective.rewards: {configs.REWARD}:{path}" for path in paths}
    if (judge := config.objective.judge) and not is_endpoint(judge):
        models[judge] = f"config.objective.judge={judge}"
    return models


def _digest(path: str) -> str:
    where = Path(path).expanduser()
    if (where / "checkpoints").is_dir():
        _, step = best.chosen(where, None)
        try:
            content = [digest.read(where / "checkpoints" / str(step))["leaves"]]
        except ValueError as error:
            raise UserError(f"{where}: step {step}: {error}") from error
        content += [read_json(where / origin.FILE)["sha256"]] if origin.is_recorded(where) else []
    elif (where / adapters.CONFIG).is_file():
        content = [adapters.directory_digest(where)]
    else:
        reader = open_source(locate(path))
        content = [adapters.base_digest(reader, spec_from_config(reader.config)), reader.config]
        if (its := classifier(reader)) is not None and its.kind:
            content.append(hashlib.sha256(np.asarray(its.head(), np.float32).tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _bytes(path: str, mesh: Mesh) -> float:
    """Of what `load` makes of `path`, on a device of the mesh."""
    where = Path(path).expanduser()
    if (where / "checkpoints").is_dir():
        config = configs.read(where / "config.json")
        spec = spec_from_config(open_source(locate(config.model.source, config.model.revision, False), False).config)
        model = Decoder(spec, *(jnp.dtype(config.model[key]) for key in ("dtype", "param_dtype")))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            variables, _ = assemble.abstract_variables(config, model, mesh)
        return sum(map(bytes_on_device, jax.tree.leaves(variables)))
    source, adapter = path, 0
    if (where / adapters.CONFIG).is_file():
        source = read_json(inside(where, adapters.CONFIG)).get("base_model_name_or_path") or ""
        adapter = sum(file.stat().st_size for file in where.glob("adapter_model.*"))  # whole on each device
    dtype = jnp.dtype(stored_dtype(source))
    spec = spec_from_config(open_source(locate(source, weights=False), weights=False).config)
    return adapter + sum(map(bytes_on_device, jax.tree.leaves(abstract_params(Decoder(spec, dtype, dtype), mesh))))


def _of_directory(path: str, model: str) -> RewardModel:
    where = Path(path).expanduser()
    if (where / adapters.CONFIG).is_file():
        config = read_json(inside(where, adapters.CONFIG))
        facts = read_json(inside(where, adapters.FACTS)) if (where / adapters.FACTS).is_file() else {}
        source = model or config.get("base_model_name_or_path") or ""
        base, variables = load_model(source, {"adapter": path}, stored_dtype(source), heads=True)
        return _of_files(path, base, variables["adapter"], kind_of(config), facts.get(FACTS))
    if model:
        raise UserError(f"{path}: is a whole model, or no model at all, and needs none beside it; leave {model} out")
    base, variables = load_model(path, {}, stored_dtype(path), heads=True)
    its = classifier(base.reader)
    return _of_files(path, base, variables[NONE], its and its.kind, base.reader.config.get(FACTS))


def _of_run(workdir: Path, step: str | None, model: str) -> RewardModel:
    config, base, variables, _ = assemble.load_run(workdir, best.choose(workdir, step), {"model": model}, _check_run)
    mean, std = normalization(variables.pop("kept"))
    return RewardModel(base, variables, mean, std, config.objective.label_noise, config.data.max_length)


def _check_run(config: Any, base: Base, variables: Tree) -> None:
    if method_of(config).rows != "ranked":
        raise UserError(
            f"this is a run of objective.name={config.objective.name!r}, not a reward model; train one with "
            "objective.name=reward"
        )


def _of_files(path: str, base: Base, variables: Tree, kind: str | None, facts: Any) -> RewardModel:
    facts = facts if isinstance(facts, dict) else {}
    if kind != TEXTS or ("method" in facts and "mean" not in facts):
        has = {None: "a head for tokens", TEXTS: "classes"}.get(kind, f"the head of a model {kind}")
        raise UserError(f"{path}: has {has}, not for a reward; train one with objective.name=reward")
    heads = variables[COLLECTION][SCORE]["kernel"].shape[-1]
    mean, std = (_numbers(facts, name, heads, other, path) for name, other in (("mean", 0.0), ("std", 1.0)))
    noise, length = facts.get("label_noise", 0.0), facts.get("max_length", base.model.spec.max_position_embeddings)
    if not isinstance(noise, int | float) or not 0 <= noise < 1 or type(length) is not int or length < 2:
        raise UserError(f"{path}: {FACTS} has label_noise={noise!r} and max_length={length!r}; export it again")
    return RewardModel(base, variables, mean, std, float(noise), length)


def _numbers(facts: Mapping[str, Any], name: str, count: int, other: float, path: str) -> np.ndarray:
    """float64 [count] of `facts`, or `other` where it has none."""
    values = facts.get(name, [other] * count)
    good = isinstance(values, list) and len(values) == count and all(_is_finite(value) for value in values)
    if not good or (name == "std" and min(values) <= 0):
        raise UserError(f"{path}: {FACTS} has {name}={json.dumps(values)} for {count} heads; export it again")
    return np.asarray(values, np.float64)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def stored_dtype(source: str) -> str:
    """The type of a model's weights, as its config.json says; float32 where it says none that is computed in."""
    config = open_source(locate(source, weights=False), weights=False).config
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in configs.DTYPES else "float32"


def _turns(pair: tuple[str, str]) -> list[dict]:
    prompt, answer = pair
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _rows(count: int, length: int, parts: int) -> int:
    """The rows of a batch, so that few shapes are compiled whatever is scored: powers of two, for each of the mesh's
    parts that has rows of its own, up to so many tokens."""
    return parts * min(2 ** math.ceil(math.log2(math.ceil(count / parts))), max(TOKENS // length, 1))


@functools.partial(jax.jit, static_argnums=0)
def _at_end(model: Decoder, variables: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, K]: what the head says at the last token of the document in each row; 0 of an empty row."""
    last = is_last(batch["segment_ids"])
    found = jnp.where(last[..., None], scores(model, variables, batch, None), 0).sum(axis=1)
    return sharding.constrain(found, None, None)  # whole, for every host
