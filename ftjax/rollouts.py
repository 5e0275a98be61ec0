"""Batches that the model writes itself: completions of prompts, rewarded and compared with others of the same prompt.

A batch is a function of its index and of the state before it: prompts in the loader's order, completions drawn by
(seed, number of the completion, token). So a run that goes on writes what it would have written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed, tree
from ftjax.assemble import Base, Program
from ftjax.atomic import write_text
from ftjax.data.audit.checks import spread
from ftjax.data.batch import packing
from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Document
from ftjax.data.read.sources import TASK
from ftjax.data.tokens.examples import Examples
from ftjax.errors import UserError
from ftjax.evals import scored
from ftjax.evals.entries import TASK_SCORE
from ftjax.evals.scored import Question, ScoredSet
from ftjax.evals.scores import Score
from ftjax.method import method_of
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.reference import policy_and_reference
from ftjax.sampling.engine import Completion, generate
from ftjax.sampling.sampler import Sampling
from ftjax.tasks import registry
from ftjax.training import metrics
from ftjax.training.source import Batch
from ftjax.training.state import TrainState
from ftjax.tree import Tree

FILE = "rollouts.jsonl"  # in the workdir: the completions of the first prompt of each round
_CHECKED = 2000  # rows of which it is seen beforehand whether they can be rewarded
_LENGTHS = 64  # rows of a batch have a multiple of it tokens, since each length is compiled
_LEAST = 1e-4  # added to the standard deviation of rewards, as in TRL


class Reward(NamedTuple):
    """One of the rewards whose weighted sum counts.

    Attributes:
      scores: that of the rows of each entry of data.train.
    """

    name: str
    weight: float
    scores: list[Score]


def rewards_of(config: ConfigDict) -> list[Reward]:
    """What config.objective.rewards names; a task's own score where it names nothing.

    Raises:
      UserError: a score that is not there, or that a source does not have.
    """
    entries = [entry["source"] for entry in configs.sources(config, "train")]
    where = "config.objective.rewards"
    named = [(one, 1.0) if isinstance(one, str) else tuple(one) for one in config.objective.rewards]
    if not named or TASK_SCORE in dict(named):
        lacking = [source for source in entries if not _has_own(source)]
        if lacking:
            raise UserError(
                f"{where}: {lacking[0]} is no task with a score of its own, so say what is rewarded: "
                "--config.objective.rewards=\"('exact',)\", or another score (docs/evaluation.md), reward:PATH, or "
                "MODULE:FUNCTION"
            )
    if twice := next((name for name, _ in named if [other for other, _ in named].count(name) > 1), None):
        raise UserError(f"{where}: {twice!r} stands there twice; give it one weight")
    run_code = config.evaluate.run_code
    return [
        Reward(name, weight, [scored.score_of(name, source, run_code, where) for source in entries])
        for name, weight in named or [(TASK_SCORE, 1.0)]
    ]


def _has_own(source: str) -> bool:
    return source.startswith(TASK) and hasattr(registry.get(source.removeprefix(TASK)), "score")


def check(config: ConfigDict, spec: DecoderSpec, loader: Loader) -> None:
    """UserError where the prompts of `loader` cannot be rewarded, or the model would not say again how likely what it
    wrote was; nothing for a method without rollouts.
    """
    if not method_of(config).rollouts:
        return
    if config.steps % config.rollouts.iterations:
        raise UserError(
            f"config.steps={config.steps}: the model writes for {config.rollouts.iterations} steps at a time "
            f"(config.rollouts.iterations); set a multiple, such as --config.steps="
            f"{-(-config.steps // config.rollouts.iterations) * config.rollouts.iterations}"
        )
    ends = [rope.long_after for rope in spec.ropes if rope.long_frequencies is not None]
    if ends and config.data.max_length > min(ends):
        raise UserError(
            f"config.data.max_length={config.data.max_length}: beyond {min(ends):.0f} tokens this model has other "
            "rotary frequencies, by the length that a completion may have in writing and that it has in training; set "
            f"--config.data.max_length={min(ends):.0f} or less"
        )
    rewards, examples = rewards_of(config), loader.examples
    for i in spread(len(examples), _CHECKED).tolist():
        for reward in rewards:
            scored.check(reward.scores[examples.source_ids[i]], reward.name, _question(examples, i))


def _question(examples: Examples, index: int) -> Question:
    return scored.question_of(examples.row(index), examples.raw(index))


class Rollouts:
    """The `training.source.Source` of a method whose model writes what it learns from.

    loader: of the prompts, of which a batch has config.data.batch_size / config.rollouts.samples.

    Raises:
      UserError: in `batch`, where a reward fails or is no finite number, with the row and the completion.
    """

    def __init__(self, config: ConfigDict, base: Base, program: Program, frozen: Tree, loader: Loader, workdir: Path):
        self._config, self._base, self._program, self._frozen = config, base, program, frozen
        self._loader, self._rewards, self._file = loader, rewards_of(config), workdir / FILE
        self.updates = config.rollouts.iterations
        self._round, self._made = -1, None
        self._writes_on = False

    def batch(self, index: int, state: TrainState) -> Batch:
        round_, step = divmod(index, self.updates)
        if self._made is None or self._round != round_:
            self._made, self._round = self._make(round_, state), round_
        return self._made if step == 0 else self._made._replace(metrics={})

    def epoch_at(self, index: int) -> float:
        return self._loader.epoch_at(index // self.updates)

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _make(self, round_: int, state: TrainState) -> Batch:
        settings, examples = self._config.rollouts, self._loader.examples
        chosen = np.repeat(self._loader.batch_examples(round_), settings.samples)
        prompts = [examples.documents_of(i)[0].tokens for i in chosen]
        policy, _ = policy_and_reference(tree.combine(state.trainable, self._frozen))
        completions = generate(
            self._base.model,
            policy,
            prompts,
            settings.max_new_tokens,
            self._base.end_tokens,
            Sampling(settings.temperature, seed=self._config.seed),
            settings.batch_size,
            first=round_ * len(chosen),
        )
        texts = [self._base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in completions]
        grades = self._grade(chosen, texts)
        total = grades @ np.array([reward.weight for reward in self._rewards])
        advantages = advantages_of(total.reshape(-1, settings.samples), self._config.objective.scale_rewards)
        if distributed.is_first():
            self._record(round_ * self.updates + 1, chosen[0], texts, grades, advantages)
        arrays = self._lay(prompts, completions, advantages.reshape(-1))
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), self._metrics(grades, total, completions))

    def _lay(
        self, prompts: Sequence[np.ndarray], completions: Sequence[Completion], advantages: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The arrays of BATCH and ROLLOUT, [completions, T]: a row has a prompt with one completion."""
        documents, places = [], []
        for prompt, one in zip(prompts, completions, strict=True):
            written = one.tokens if one.stop_token is None else np.append(one.tokens, np.int32(one.stop_token))
            tokens = np.concatenate([prompt, written])
            trained = np.arange(len(tokens)) >= len(prompt)
            if self._config.objective.mask_truncated and not one.stopped:
                trained[:] = False
            documents.append([Document(tokens, trained)])
            places.append(slice(len(prompt) - 1, len(tokens) - 1))  # what predicts these tokens
        longest = max(len(document.tokens) for (document,) in documents)
        multiple = max(_LENGTHS, self._loader.multiple)
        length = min(-(-longest // multiple) * multiple, self._program.row_length)
        batch = packing.lay(documents, length, packing.BATCH | packing.ROLLOUT)
        for row, (place, one, advantage) in enumerate(zip(places, completions, advantages, strict=True)):
            batch["advantages"][row, place] = advantage
            batch["sampled_logps"][row, place] = one.logps
        for name in packing.ROLLOUT:
            batch[name] *= batch["weights"]
        return batch

    def _grade(self, chosen: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """float64 [completions, rewards]: what each reward gives."""
        examples = self._loader.examples
        questions = {i: _question(examples, i) for i in np.unique(chosen).tolist()}
        out = np.zeros((len(chosen), len(self._rewards)))
        for column, reward in enumerate(self._rewards):
            for source, how in enumerate(reward.scores):
                rows = np.flatnonzero(examples.source_ids[chosen] == source)
                if not len(rows):
                    continue
                its = ScoredSet("rollouts", reward.name, (), how)
                # By one process: programs, and functions that ask elsewhere, may not give the same to each.
                is_mine = how.together is not None or distributed.is_first()
                asked = [questions[int(chosen[row])] for row in rows]
                found = json.dumps(its.grade_all([texts[row] for row in rows], asked)) if is_mine else None
                out[rows, column] = json.loads(distributed.tell(found, limit=distributed.LOADING_SECONDS))
        return out

    def _metrics(self, grades: np.ndarray, total: np.ndarray, completions: Sequence[Completion]) -> dict[str, float]:
        """By TRL's names."""
        groups = total.reshape(-1, self._config.rollouts.samples)
        lengths = np.array([len(one.logps) for one in completions])
        ended = np.array([one.stopped for one in completions])
        out = {
            "reward": total.mean(),
            "reward_std": groups.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": (groups.std(axis=1) < 1e-8).mean(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - ended.mean(),
            "completions/mean_terminated_length": lengths[ended].mean() if ended.any() else 0.0,
        }
        for reward, values in zip(self._rewards, grades.T, strict=True):
            out |= {f"rewards/{reward.name}/mean": values.mean(), f"rewards/{reward.name}/std": values.std(ddof=1)}
        return {name: float(value) for name, value in out.items()}

    def _record(
        self, step: int, example: int, texts: Sequence[str], grades: np.ndarray, advantages: np.ndarray
    ) -> None:
        """Adds a line with the completions of the first prompt; lines of later steps, of a run that was killed, go."""
        if not self._writes_on:
            earlier = [record for record in metrics.read(self._file) if record["step"] < step]
            write_text(self._file, "".join(map(_line, earlier)))
            self._writes_on = True
        question = _question(self._loader.examples, int(example))
        names = [reward.name for reward in self._rewards]
        answers = [
            {"text": text, "rewards": dict(zip(names, given.tolist())), "advantage": float(advantage)}
            for text, given, advantage in zip(texts, grades, advantages[0])
        ]
        record = {"step": step, "prompt": question.prompt.last, "expected": question.expected, "completions": answers}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def advantages_of(rewards: np.ndarray, scale: str) -> np.ndarray:
    """How much better each completion is than the others of its prompt, float64 as rewards [prompts, samples].

    Shao et al. 2024 (arXiv:2402.03300, section 4.1.2): less the mean of the prompt's, and with scale "group" over their
    standard deviation, with "batch" over that of all, with "none" over nothing (Liu et al. 2025, arXiv:2503.20783).
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centered
    deviation = rewards.std(axis=1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    return centered / (deviation + _LEAST)
