"""Evaluation of a run at one step, on everything in `data.eval`: rows by their loss, or by the score of completions."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ftjax import distributed, sharding, tree
from ftjax.assemble import Base, Program
from ftjax.atomic import write_rows
from ftjax.data.batch.loader import Loader
from ftjax.errors import UserError
from ftjax.evals import forgetting, scored
from ftjax.evals.likely import LikelySet, likely_sets
from ftjax.evals.scored import ScoredSet
from ftjax.objectives.loss import TOTALS, Loss, means, merged
from ftjax.objectives.reference import policy_and_reference
from ftjax.prompts import tokens
from ftjax.sampling.engine import generate
from ftjax.sampling.pictured import Pictured
from ftjax.sampling.sampler import Sampling
from ftjax.training.display import Display
from ftjax.training.metrics import read
from ftjax.training.preemption import Preemption
from ftjax.training.step import make_eval_step
from ftjax.tree import Tree


class Evaluator:
    """evaluator(step, trainable, frozen) -> {"eval_...": float}; completions go to samples.jsonl.

    After SIGTERM it raises Preempted between two batches.

    Raises:
      UserError: on creation, if a row cannot be scored, or prompts and completions together are too long for the model.
    """

    def __init__(
        self,
        config: ConfigDict,
        base: Base,
        program: Program,
        loader: Loader | None,
        workdir: Path,
        preemption: Preemption,
        display: Display,
    ):
        self._config, self._base, self._mesh, self._loader = config.evaluate, base, program.mesh, loader
        self._seed, self._sets = config.seed, scored.scored_sets(config)
        asked = [[question.prompt for question in its.questions] for its in self._sets]
        self._prompts = [[tokens(prompt, base.tokenizer, rules=base.images) for prompt in its] for its in asked]
        self._likely = likely_sets(config, base.tokenizer, base.model.spec.max_position_embeddings)
        self._eval_step, self._totals = make_eval_step(program.objective), program.totals
        self._samples = workdir / "samples.jsonl"
        self._preemption, self._display = preemption, display
        self._check_lengths()
        asked = [prompt for prompts in self._prompts for prompt in prompts if isinstance(prompt, np.ndarray)]
        asked += forgetting.prompts_of(loader)
        self._watch = forgetting.Watch(config, base, asked, lambda done, total: preemption.check())

    def begin(self, variables: Tree) -> None:
        """To be called before all else with the variables that training starts from, in runs that go on, too."""
        self._watch.begin(variables)

    def digest(self) -> str:
        """Of what is measured on: rows, questions, settings that a score depends on. Two that differ do not compare.

        Not of the places where rows are found, which may change.
        """
        rows = self._loader and self._loader.examples.digest
        asked = [[its.metric, [question.example for question in its.questions]] for its in self._sets]
        asked += [its.how.model for its in self._sets if its.how.model]
        answers = ("max_new_tokens", "samples", "temperature")  # settings that a score depends on
        settings = [self._config[key] for key in answers if asked]
        asked += [[its.metric, its.contents()] for its in self._likely]
        general = [list(self._config.general), self._config.general_tokens]
        whole = json.dumps([rows, asked, settings, general], sort_keys=True, default=str)
        return hashlib.sha256(whole.encode()).hexdigest()[:8]

    def __call__(self, step: int, trainable: Tree, frozen: Tree) -> dict[str, float]:
        metrics = {}
        if self._loader is not None:
            metrics |= self._heldout_metrics(trainable, frozen)
            self._display.say(f"step {step}: held-out loss {metrics['eval_loss']:.4f}")
        policy, _ = policy_and_reference(tree.combine(trainable, frozen))
        for its, prompts in zip(self._sets, self._prompts, strict=True):
            records = self._score(step, its, prompts, policy)
            found = its.means([record["score"] for record in records], self._config.samples)
            metrics |= found
            if distributed.is_first():
                self._write_samples(step, its.name, records)
            told = ", ".join(f"{name.rpartition('/')[2]} {value:.1%}" for name, value in list(found.items())[1:])
            self._display.say(
                f"step {step}: {its.name} scores {found[its.metric]:{'.1%' if its.how.share else '.4g'}} on "
                f"{len(its.questions)} examples" + (f" ({self._config.samples} answers each; {told})" if told else "")
            )
        for its in self._likely:
            metrics |= self._likelihoods(step, its, policy)
        if watched := self._watch(step, trainable, frozen):
            metrics |= watched
            self._display.say(f"step {step}: {forgetting.in_short(watched)}")
        return metrics

    def _heldout_metrics(self, trainable: Tree, frozen: Tree) -> dict[str, float]:
        """{"eval_loss", "eval_mean_token_accuracy", ...}: means over the trained tokens of all batches."""
        if self._totals is not None:
            variables = tree.combine(trainable, frozen)
            sums = functools.partial(jax.tree.map, jnp.add)
            frozen = frozen | {TOTALS: self._added(lambda batch: self._totals(variables, batch), sums)}
        total = self._added(lambda batch: self._eval_step(trainable, frozen, batch), _both)
        return {f"eval_{name}": float(value) for name, value in means(total).items()}

    def _added(self, measure: Callable[[dict[str, jax.Array]], Any], add: Callable[[Any, Any], Any]) -> Any:
        """What `measure` gives of all held-out batches, each added to those before it."""
        total = None
        for batch in self._loader.eval_batches(sharding.local_rows(self._mesh, self._loader.batch_size)):
            self._preemption.check()
            placed = sharding.placed(self._mesh, batch)
            found = measure(placed)
            total = found if total is None else add(total, found)
        return total

    def _likelihoods(self, step: int, its: LikelySet, variables: Tree) -> dict[str, float]:
        with self._display.counter(f"{its.name} at step {step}", len(its.rows)) as advance:

            def on_progress(done: int, total: int) -> None:
                advance(done * len(its.rows) // total)  # a question has several choices
                self._preemption.check()

            found = its.measure(self._base.model, variables, self._base.tokenizer, on_progress)
        told = ", ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in found.items())
        self._display.say(f"step {step}: {its.name} has {told} on {len(its.rows)} rows")
        return found

    def _score(self, step: int, its: ScoredSet, prompts: list[np.ndarray | Pictured], variables: Tree) -> list[dict]:
        """A record of each answer: prompt, completion, expected, score; those of a question beside each other."""
        prompts, questions = (
            [one for one in of for _ in range(self._config.samples)] for of in (prompts, its.questions)
        )
        with self._display.counter(f"{its.name} at step {step}", len(prompts)) as advance:

            def on_progress(done: int, total: int) -> None:
                advance(done)
                self._preemption.check()

            completions = generate(
                self._base.model,
                variables,
                prompts,
                self._config.max_new_tokens,
                self._base.end_tokens,
                Sampling(self._config.temperature, seed=self._seed),
                self._config.batch_size,
                on_progress,
            )
        texts = [self._base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in completions]
        # By one process: programs, and functions that ask elsewhere, may not give the same to each.
        is_mine = its.how.together is not None or distributed.is_first()
        grades = json.dumps(its.grade_all(texts, questions)) if is_mine else None
        grades = json.loads(distributed.tell(grades, limit=distributed.LOADING_SECONDS))
        return [
            {"prompt": question.prompt.last, "completion": text, "expected": question.expected, "score": grade}
            for question, text, grade in zip(questions, texts, grades, strict=True)
        ]

    def _check_lengths(self) -> None:
        """UserError for prompts that leave no room for a completion: now, and not after hours of training."""
        positions = self._base.model.spec.max_position_embeddings
        for its, prompts in zip(self._sets, self._prompts, strict=True):
            longest = max(map(len, prompts))
            if longest + self._config.max_new_tokens > positions:
                raise UserError(
                    f"config.evaluate.max_new_tokens={self._config.max_new_tokens}: with a prompt of {longest} tokens "
                    f"({its.name}) that exceeds the model's {positions} positions; lower it"
                )

    def _write_samples(self, step: int, name: str, records: list[dict]) -> None:
        """Replaces this step's lines of this set, and those of later steps, which a killed run left."""
        samples = read(self._samples)
        kept = [old for old in samples if old["step"] < step or (old["step"] == step and old["source"] != name)]
        new = [{"step": step, "source": name} | record for record in records]
        write_rows(self._samples, kept + new)


@jax.jit
def _both(one: Loss, other: Loss) -> Loss:
    return merged(jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other))
