"""Evaluation of a run at one step, on everything in `data.eval`: rows by their loss, tasks by their score."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed, sharding, tree
from ftjax.assemble import Base
from ftjax.atomic import write_text
from ftjax.data.batch.loader import Loader
from ftjax.data.read import splits
from ftjax.data.read.sources import TASK
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.objectives.loss import Objective
from ftjax.objectives.reference import policy_and_reference
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import registry
from ftjax.training.display import Display
from ftjax.training.preemption import Preemption
from ftjax.training.step import make_eval_step, means
from ftjax.tree import Tree


def is_eval(record: dict) -> bool:
    """Whether a record of metrics.jsonl is of an evaluation."""
    return any(name.startswith("eval_") for name in record)


def best_metric(config: ConfigDict) -> tuple[str | None, str]:
    """What decides unless config.evaluate.best does, and "max" or "min": the first task's score, else the loss."""
    if tasks := _tasks(config):
        return _score_name(tasks[0]), "max"
    return ("eval_loss" if configs.evaluates(config) else None), "min"


class Evaluator:
    """evaluator(step, trainable, frozen) -> {"eval_...": float}; completions go to samples.jsonl.

    After SIGTERM it raises Preempted between two batches.

    Raises:
      UserError: on creation, if a task's prompts and completions together are too long for the model.
    """

    def __init__(
        self,
        config: ConfigDict,
        base: Base,
        mesh: Mesh,
        objective: Objective,
        loader: Loader | None,
        workdir: Path,
        preemption: Preemption,
        display: Display,
    ):
        self._config, self._base, self._mesh, self._loader = config.evaluate, base, mesh, loader
        self._tasks = _tasks(config)
        self._eval_step = make_eval_step(objective)
        self._samples = workdir / "samples.jsonl"
        self._preemption, self._display = preemption, display
        self._check_lengths()

    def digest(self) -> str:
        """Of what is measured on: rows, examples, and settings that a score depends on; two that differ do not compare.

        Not of the places where rows are found, which may change.
        """
        parts: list[Any] = [self._loader.examples.digest] if self._loader is not None else []
        for entry in self._tasks:
            options = {name: value for name, value in entry.items() if name != "source"}
            parts.append([_name(entry), options, _examples(entry)[1], self._config.max_new_tokens])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    def __call__(self, step: int, trainable: Tree, frozen: Tree) -> dict[str, float]:
        metrics = {}
        if self._loader is not None:
            metrics |= self._heldout_metrics(trainable, frozen)
            self._display.say(f"step {step}: held-out loss {metrics['eval_loss']:.4f}")
        for entry in self._tasks:
            score, records = self._score(step, entry, policy_and_reference(tree.combine(trainable, frozen))[0])
            metrics[_score_name(entry)] = score
            if distributed.is_first():
                self._write_samples(step, _name(entry), records)
            self._display.say(f"step {step}: {entry['source']} scores {score:.1%} on {len(records)} examples")
        return metrics

    def _heldout_metrics(self, trainable: Tree, frozen: Tree) -> dict[str, float]:
        """{"eval_loss", "eval_mean_token_accuracy", ...}: means over the trained tokens of all batches."""
        total = None
        for batch in self._loader.eval_batches(sharding.local_rows(self._mesh, self._loader.batch_size)):
            self._preemption.check()
            placed = {name: sharding.place(self._mesh, ("batch", "length"), array) for name, array in batch.items()}
            loss = self._eval_step(trainable, frozen, placed)
            total = loss if total is None else jax.tree.map(jnp.add, total, loss)
        return {f"eval_{name}": float(value) for name, value in means(total).items()}

    def _score(self, step: int, entry: dict[str, str], variables: Tree) -> tuple[float, list[dict]]:
        """The mean score over a task's examples, and a record of each: prompt, completion, expected, score."""
        task, examples = _examples(entry)
        with self._display.counter(f"{entry['source']} at step {step}", len(examples)) as advance:

            def on_progress(done: int, total: int) -> None:
                advance(done)
                self._preemption.check()

            completions = generate(
                self._base.model,
                variables,
                self._prompts(examples),
                self._config.max_new_tokens,
                self._base.end_tokens,
                Sampling(),
                self._config.batch_size,
                on_progress,
            )
        records = []
        for example, completion in zip(examples, completions, strict=True):
            text = self._base.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            *prompt, expected = example["messages"]
            records.append(
                {
                    "prompt": prompt[-1]["content"],
                    "completion": text,
                    "expected": expected["content"],
                    "score": float(task.score(text, example)),
                }
            )
        return sum(record["score"] for record in records) / len(records), records

    def _prompts(self, examples: list[dict]) -> list[np.ndarray]:
        """The tokens of each conversation before its last turn, which is the expected answer."""
        return [render_prompt(example["messages"][:-1], self._base.tokenizer) for example in examples]

    def _check_lengths(self) -> None:
        """UserError for prompts that leave no room for a completion: now, and not after hours of training."""
        positions = self._base.model.spec.max_position_embeddings
        for entry in self._tasks:
            longest = max(map(len, self._prompts(_examples(entry)[1])))
            if longest + self._config.max_new_tokens > positions:
                raise UserError(
                    f"config.evaluate.max_new_tokens={self._config.max_new_tokens}: with a prompt of {longest} tokens "
                    f"({entry['source']}) that exceeds the model's {positions} positions; lower it"
                )

    def _write_samples(self, step: int, name: str, records: list[dict]) -> None:
        """Replaces this step's lines of this source, and those of later steps, which a killed run left."""
        lines = self._samples.read_text().splitlines() if self._samples.exists() else []
        samples = [json.loads(line) for line in lines]
        kept = [old for old in samples if old["step"] < step or (old["step"] == step and old["source"] != name)]
        new = [{"step": step, "source": name} | record for record in records]
        write_text(self._samples, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in kept + new))


def _tasks(config: ConfigDict) -> list[dict[str, Any]]:
    """The entries of data.eval that are tasks."""
    return [entry for entry in configs.sources(config, "eval") if entry["source"].startswith(TASK)]


def _examples(entry: dict[str, Any]) -> tuple[ModuleType, list[dict]]:
    """The task of an entry, and the examples that its `split` and `limit` select, like `sources`."""
    source = entry["source"]
    if unused := sorted({"columns", "format", "weight"} & entry.keys()):
        raise UserError(f"config.data.eval: {source} is scored, which knows no {unused[0]!r}; leave it out")
    task, split = registry.get(source.removeprefix(TASK)), splits.parse_split(entry.get("split", "test"), source)
    examples = registry.examples(task, split.name)
    return task, [examples[i] for i in splits.select(len(examples), split, entry.get("limit"), source)]


def _name(entry: dict[str, str]) -> str:
    """support_ticket, or support_ticket[train] for another split than test."""
    split = entry.get("split", "test")
    return entry["source"].removeprefix(TASK) + (f"[{split}]" if split != "test" else "")


def _score_name(entry: dict[str, str]) -> str:
    return f"eval_{_name(entry)}/score"
