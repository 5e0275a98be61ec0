"""Everything in `data.eval`, measured at one step of a run: rows by their loss, tasks by their score."""

import json
from collections.abc import Callable, Iterable
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
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.reference import policy_and_reference
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import registry
from ftjax.training.display import Display
from ftjax.training.preemption import Preemption
from ftjax.training.step import make_eval_step, means
from ftjax.tree import Tree


def is_eval(record: dict) -> bool:
    """Whether a record of metrics.jsonl is an evaluation's."""
    return any(name.startswith("eval_") for name in record)


def best_metric(config: ConfigDict) -> tuple[str | None, str]:
    """The metric that names the best checkpoint, and max or min: the first task's score, else the held-out loss."""
    entries = configs.sources(config, "eval")
    for entry in entries:
        if entry["source"].startswith(TASK):
            return _score_name(entry), "max"
    return ("eval_loss" if configs.evaluates(config) else None), "min"


class Evaluator:
    """Called as evaluator(step, trainable, frozen) -> {"eval_...": float}; completions go to samples.jsonl.

    SIGTERM is honored between two batches of completions (Preempted).
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
        self._tasks = [entry for entry in configs.sources(config, "eval") if entry["source"].startswith(TASK)]
        self._eval_step = make_eval_step(objective)
        self._samples = workdir / "samples.jsonl"
        self._preemption, self._display = preemption, display
        self._check_lengths()

    def __call__(self, step: int, trainable: Tree, frozen: Tree) -> dict[str, float]:
        found = {}
        if self._loader is not None:
            rows = sharding.local_rows(self._mesh, self._loader.batch_size)
            batches, check = self._loader.eval_batches(rows), self._preemption.check
            found |= heldout_metrics(self._eval_step, trainable, frozen, batches, self._mesh, check)
            self._display.say(f"step {step}: held-out loss {found['eval_loss']:.4f}")
        for entry in self._tasks:
            score, records = self._score(step, entry, policy_and_reference(tree.combine(trainable, frozen))[0])
            found[_score_name(entry)] = score
            if distributed.is_first():
                self._write_samples(step, _name(entry), records)
            self._display.say(f"step {step}: {entry['source']} scores {score:.1%} on {len(records)} examples")
        return found

    def _score(self, step: int, entry: dict[str, str], variables: Tree) -> tuple[float, list[dict]]:
        task, examples = _examples(entry)

        with self._display.counter(f"{entry['source']} at step {step}", len(examples)) as advance:

            def on_progress(done: int, total: int) -> None:
                advance(done)
                self._preemption.check()

            def complete(prompts: list[np.ndarray]) -> list[np.ndarray]:
                completions = generate(
                    self._base.model,
                    variables,
                    prompts,
                    self._config.max_new_tokens,
                    self._base.end_tokens,
                    Sampling(),
                    self._config.batch_size,
                    on_progress,
                )
                return [completion.tokens for completion in completions]

            return score_task(task, examples, self._base.tokenizer, complete)

    def _check_lengths(self) -> None:
        """What could not be completed is a mistake to be told now, not after hours of training."""
        positions = self._base.model.spec.max_position_embeddings
        for entry in self._tasks:
            prompts = (render_prompt(example["messages"][:-1], self._base.tokenizer) for example in _examples(entry)[1])
            longest = max(map(len, prompts))
            if longest + self._config.max_new_tokens > positions:
                raise UserError(
                    f"config.evaluate.max_new_tokens={self._config.max_new_tokens}: with a prompt of {longest} tokens "
                    f"({entry['source']}) that passes the model's {positions} positions; lower it"
                )

    def _write_samples(self, step: int, name: str, records: list[dict]) -> None:
        """Replaces this step's lines of this source, and all of later steps, which a killed run left."""
        lines = self._samples.read_text().splitlines() if self._samples.exists() else []
        old = map(json.loads, lines)
        kept = [one for one in old if one["step"] < step or (one["step"] == step and one["source"] != name)]
        new = [{"step": step, "source": name} | record for record in records]
        write_text(self._samples, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept + new))


def heldout_metrics(
    eval_step: Callable[[Tree, Tree, dict[str, jax.Array]], Loss],
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    on_batch: Callable[[], None],
) -> dict[str, float]:
    """{"eval_loss", "eval_mean_token_accuracy", ...}: means over the trained tokens of all batches.

    on_batch is called before each batch, and may raise to end it (`Preemption.check`).
    """
    total = None
    for batch in batches:
        on_batch()
        placed = {name: sharding.place(mesh, ("batch", "length"), array) for name, array in batch.items()}
        loss = eval_step(trainable, frozen, placed)
        total = loss if total is None else jax.tree.map(jnp.add, total, loss)
    return {f"eval_{name}": float(value) for name, value in means(total).items()}


def score_task(
    task: ModuleType, examples: list[dict], tokenizer: Any, complete: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> tuple[float, list[dict]]:
    """The mean score over the examples, and one record per example: prompt, completion, expected, score.

    examples: as `task.test_examples()` gives them, each conversation ending in the expected assistant turn.
    complete: prompts as int32 tokens -> the generated tokens of each, without the end token.
    """
    prompts = [render_prompt(example["messages"][:-1], tokenizer) for example in examples]
    records = []
    for example, tokens in zip(examples, complete(prompts), strict=True):
        completion = tokenizer.decode(tokens, skip_special_tokens=True)
        *prompt, expected = example["messages"]
        records.append(
            {
                "prompt": prompt[-1]["content"],
                "completion": completion,
                "expected": expected["content"],
                "score": float(task.score(completion, example)),
            }
        )
    return sum(record["score"] for record in records) / len(records), records


def _examples(entry: dict[str, Any]) -> tuple[ModuleType, list[dict]]:
    """The task of an entry, and those of its examples that `split` and `limit` choose, as `sources` does."""
    source = entry["source"]
    if unused := sorted({"format", "weight"} & entry.keys()):
        raise UserError(f"config.data.eval: {source} is scored, which knows no {unused[0]!r}; leave it out")
    task, split = registry.get(source.removeprefix(TASK)), splits.parse_split(entry.get("split", "test"), source)
    examples = registry.examples(task, split.name)
    return task, [examples[i] for i in splits.select(len(examples), split, entry.get("limit"), source)]


def _name(entry: dict[str, str]) -> str:
    """support_ticket, or support_ticket[train] for a split that is not the test split."""
    split = entry.get("split", "test")
    return entry["source"].removeprefix(TASK) + (f"[{split}]" if split != "test" else "")


def _score_name(entry: dict[str, str]) -> str:
    return f"eval_{_name(entry)}/score"
