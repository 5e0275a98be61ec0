"""Everything in `data.eval`, measured at one step of a run: rows by their loss, tasks by their score."""

import json
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import tree
from ftjax.assemble import Base
from ftjax.data.loader import Loader
from ftjax.data.sources import TASK
from ftjax.display import Display
from ftjax.evals.heldout import heldout_metrics
from ftjax.evals.task import score_task
from ftjax.objectives.loss import Objective
from ftjax.preemption import Preemption
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.step import make_eval_step
from ftjax.tasks import registry
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
    return ("eval_loss" if entries else None), "min"


class Evaluator:
    """Called as evaluator(step, trainable, frozen) -> {"eval_...": float}; completions go to samples.jsonl.

    SIGTERM is honoured between two batches of completions (Preempted).
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

    def __call__(self, step: int, trainable: Tree, frozen: Tree) -> dict[str, float]:
        found = {}
        if self._loader is not None:
            found |= heldout_metrics(self._eval_step, trainable, frozen, self._loader.eval_batches(), self._mesh)
            self._display.say(f"step {step}: held-out loss {found['eval_loss']:.4f}")
        for entry in self._tasks:
            score, records = self._score(step, entry, tree.combine(trainable, frozen))
            found[_score_name(entry)] = score
            self._write_samples(step, entry["source"], records)
            self._display.say(f"step {step}: {entry['source']} scores {score:.1%} on {len(records)} examples")
        return found

    def _score(self, step: int, entry: dict[str, str], variables: Tree) -> tuple[float, list[dict]]:
        task = registry.get(entry["source"].removeprefix(TASK))
        examples = registry.examples(task, entry.get("split", "test"))

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

    def _write_samples(self, step: int, source: str, records: list[dict]) -> None:
        """Replaces this step's lines, and later ones, which a killed run left."""
        lines = self._samples.read_text().splitlines() if self._samples.exists() else []
        old = [sample for sample in map(json.loads, lines) if (sample["step"], sample["source"]) < (step, source)]
        new = [{"step": step, "source": source} | record for record in records]
        self._samples.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in old + new))


def _score_name(entry: dict[str, str]) -> str:
    return f"eval_{entry['source'].removeprefix(TASK)}/score"
