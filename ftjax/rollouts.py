"""Batches that the model writes itself: completions of prompts, rewarded and compared with others of the same prompt.

A batch is a function of its index and of the state before it: prompts in the loader's order, completions drawn by
(seed, number of the completion, token). So a run that goes on writes what it would have written.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax import critic, distributed, environments, rewarding, tree
from ftjax.assemble import Base, Program
from ftjax.atomic import write_rows
from ftjax.data.batch import packing
from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Document
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.episodes import Episode, make_play
from ftjax.errors import UserError
from ftjax.method import lasting, method_of
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.ppo import KL_COEF
from ftjax.objectives.reference import policy_and_reference
from ftjax.returns import Learned, Round, correction
from ftjax.sampling import stop_strings
from ftjax.training import metrics
from ftjax.training.source import Batch
from ftjax.training.state import TrainState
from ftjax.tree import Tree

FILE = "rollouts.jsonl"  # in the workdir: the completions of the first prompt of each round
_LENGTHS = 64  # rows of a batch have a multiple of it tokens, since each length is compiled
_EQUAL = 1e-8  # rewards of a smaller standard deviation are equal, as in TRL


def check(config: ConfigDict, spec: DecoderSpec, tokenizer: Tokenizer, loader: Loader) -> None:
    """UserError where the prompts of `loader` cannot be rewarded, or the model would not say again how likely what it
    wrote was; nothing for a method without rewards.
    """
    if "rewards" not in method_of(config).settings:
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
    stop_strings.check(config.rollouts.stop_strings, "config.rollouts.stop_strings")
    environments.factory(config, tokenizer)
    rewarding.check(config, loader.examples)


class Written(NamedTuple):
    """The completions of a round, those of a prompt beside each other.

    Attributes:
      chosen: int [completions], the example of each.
      prompts: its tokens.
    """

    chosen: np.ndarray
    prompts: Sequence[np.ndarray]
    completions: Sequence[Episode]

    def of(self, places: np.ndarray) -> "Written":
        """Those completions alone, in that order."""
        return Written(self.chosen[places], *([them[i] for i in places] for them in self[1:]))


class Record:
    """The file of a workdir that says what the model wrote to the first prompt of each round."""

    def __init__(self, workdir: Path):
        self._file, self._writes_on = workdir / FILE, False

    def add(self, step: int, prompt: str, expected: str, completions: Sequence[Mapping[str, Any]]) -> None:
        """Adds a line; lines of this step and later ones, of a run that was killed, go."""
        if not self._writes_on:
            earlier = [record for record in metrics.read(self._file) if record["step"] < step]
            write_rows(self._file, earlier)
            self._writes_on = True
        record = {"step": step, "prompt": prompt, "expected": expected, "completions": completions}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Rollouts:
    """The `training.source.Source` of a method whose model writes what it learns from.

    loader: of the prompts, of which a batch has config.data.batch_size / config.rollouts.samples, or
      / config.rollouts.learned.
    ptx: of the rows that each step has beside the completions, None where it has none.
    between: see `episodes.make_play`.

    Raises:
      UserError: in `batch`, where a reward fails or is no finite number, with the row and the completion.
    """

    def __init__(
        self,
        config: ConfigDict,
        base: Base,
        program: Program,
        frozen: Tree,
        loader: Loader,
        workdir: Path,
        ptx: Loader | None = None,
        between: Callable[[], None] | None = None,
    ):
        self._config, self._base, self._program, self._frozen = config, base, program, frozen
        self._loader, self._rewards, self._said = loader, rewarding.rewards_of(config), Record(workdir)
        self.updates, self.samples = config.rollouts.iterations, config.rollouts.samples
        self._each = config.rollouts.learned or self.samples  # of the samples, those that are learned from
        self._ask = critic.make_ask(config, program, frozen)
        self._ptx = ptx
        self._play = make_play(config, base, between)
        self._round, self._made = -1, None
        self._began: float | None = None  # the last round, by the clock

    def batch(self, index: int, state: TrainState) -> Batch:
        round_ = index // self.updates
        if self._made is None or self._round != round_:
            self._made, self._round = self._make(round_, state), round_
        # In steps, from the weights that wrote to those that learn.
        written_at = max(round_ - self._config.rollouts.ahead, 0) * self.updates
        made = self._made._replace(metrics={**self._made.metrics, "sampling/staleness": float(index - written_at)})
        if self._ptx is None:
            return made
        return _with_rows(made, self._ptx.batch(index), self._ptx.batch_tokens(index))

    def epoch_at(self, index: int) -> float:
        return self._loader.epoch_at(index // self.updates)

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _make(self, round_: int, state: TrainState) -> Batch:
        every, grades = self._graded(round_, 0, state)
        total = rewarding.weighted(self._rewards, grades)
        wanted = len(total) // self.samples
        for further in range(1, self._config.rollouts.resample + 1):
            if differing(self._groups(every, total)).sum() >= wanted:
                break
            more, their_grades = self._graded(round_, further, state)
            every = Written(np.append(every.chosen, more.chosen), *([*a, *b] for a, b in zip(every[1:], more[1:])))
            grades = np.concatenate([grades, their_grades])
            total = rewarding.weighted(self._rewards, grades)
        groups = self._groups(every, total)
        kept = most_differing(groups, wanted)
        of_each = most_varied(groups[kept], self._each)
        places = (kept[:, None] * self.samples + of_each).reshape(-1)
        written = every.of(places)
        arrays = self._lay(written)
        learned = self._learned(state, arrays, written, total[places])
        for name in arrays.keys() & learned.by_token.keys():
            arrays[name][:] = learned.by_token[name]
        if distributed.is_first():
            self._record(round_ * self.updates + 1, written, grades[places], learned.by_completion)
        found = self._metrics(grades, total, every.completions) | learned.metrics | self._pace(round_, len(places))
        if self._config.rollouts.resample:
            found |= {"groups/written": float(len(groups)), "groups/kept": float(differing(groups[kept]).sum())}
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), found)

    def _groups(self, written: Written, total: np.ndarray) -> np.ndarray:
        """float64 [prompts, samples]: what the completions of a prompt are compared by."""
        ended = np.array([one.stopped for one in written.completions])
        return (total - self._config.objective.missing_eos_penalty * ~ended).reshape(-1, self.samples)

    def _learned(
        self, state: TrainState, arrays: dict[str, np.ndarray], written: Written, scores: np.ndarray
    ) -> Learned:
        """What is learned of the completions, which are worth `scores` and lie in `arrays`."""
        said = self._ask(state, arrays)
        known = Round(
            scores,
            np.array([one.stopped for one in written.completions]),
            arrays["weights"] > 0,
            said.get("old_logps", arrays["sampled_logps"]),
            said.get("reference_logps"),
            said.get("values"),
            self._each,
        )
        settings = self._config.objective
        kl_coef = float(state.kept[KL_COEF]) if KL_COEF in state.kept else settings.kl_coef
        learned = self._program.method.credit(settings, known, kl_coef)
        if "old_logps" not in said:
            return learned
        weights, metrics = correction(settings, said["old_logps"], arrays["sampled_logps"], known.mask)
        further = {"old_logps": np.where(known.mask, said["old_logps"], 0), "correction": weights}
        return learned._replace(by_token=learned.by_token | further, metrics=learned.metrics | metrics)

    def _graded(self, round_: int, further: int, state: TrainState) -> tuple[Written, np.ndarray]:
        """The completions of a round, or the further ones that replace some, and what each reward gives them."""
        written = self._write(round_, further, state)
        return written, rewarding.grade(self._rewards, self._loader.examples, written.chosen, written.completions)

    def _prompts(self, round_: int, further: int) -> np.ndarray:
        """int [prompts]: examples; of a round in the loader's order, further ones drawn by their sources' weights."""
        if not further:
            return self._loader.batch_examples(round_)
        examples = self._loader.examples
        weights = np.asarray(examples.weights)[examples.source_ids]
        draw = np.random.default_rng((self._config.seed, round_, further))
        count = self._loader.batch_size
        return draw.choice(len(examples), count, replace=np.count_nonzero(weights) < count, p=weights / weights.sum())

    def _write(self, round_: int, further: int, state: TrainState) -> Written:
        settings, examples = self._config.rollouts, self._loader.examples
        chosen = np.repeat(self._prompts(round_, further), self.samples)
        prompts = [examples.documents_of(i)[0].tokens for i in chosen]
        policy, _ = policy_and_reference(tree.combine(state.writer, self._frozen))
        policy = lasting(self._program.method, policy)
        first = (round_ * (1 + settings.resample) + further) * len(chosen)
        asked = functools.cache(lambda example: rewarding.question_of(examples, example))
        return Written(chosen, *self._play(policy, prompts, lambda i: asked(int(chosen[i])), first))

    def _lay(self, written: Written) -> dict[str, np.ndarray]:
        """The arrays of the method's batches, [completions, T]: a row has a prompt with one completion.

        Those that say what is learned of it are 0.
        """
        documents = []
        for prompt, one in zip(written.prompts, written.completions, strict=True):
            document = one.document(prompt)
            if self._config.objective.mask_truncated and not one.stopped:
                document.trained[:] = False
            documents.append([document])
        batch = lay(documents, self._loader.multiple, self._program.row_length, self._program.method.batch)
        for row, (prompt, one) in enumerate(zip(written.prompts, written.completions, strict=True)):
            places = len(prompt) - 1 + np.flatnonzero(one.sampled)  # of what predicts these tokens
            batch["sampled_logps"][row, places] = one.tempered_logps[one.sampled]
        batch["sampled_logps"] *= batch["weights"]
        return batch

    def _metrics(self, grades: np.ndarray, total: np.ndarray, completions: Sequence[Episode]) -> dict[str, float]:
        """By TRL's names."""
        groups = total.reshape(-1, self.samples)
        lengths = np.array([one.sampled.sum() for one in completions])
        ended = np.array([one.stopped for one in completions])
        out = {
            "reward": total.mean(),
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - ended.mean(),
            "completions/mean_terminated_length": lengths[ended].mean() if ended.any() else 0.0,
        }
        if self.samples > 1:
            out["reward_std"] = groups.std(axis=1, ddof=1).mean()
            out["frac_reward_zero_std"] = (~differing(groups)).mean()
        settings = self._config.rollouts
        if settings.top_k or settings.top_p < 1 or settings.min_p:
            left = np.concatenate([(one.tempered_logps - one.logps)[one.sampled] for one in completions])
            out["sampling/kept_mean"] = np.exp(left).mean()  # of the probability, what the filters leave
        if settings.environment or settings.tools:
            out["episodes/turns_mean"] = np.mean([one.turns for one in completions])
            out["episodes/environment_tokens_mean"] = np.mean([(~one.sampled).sum() for one in completions])
        if settings.tools:
            calls, failures = (sum(getattr(one, name) for one in completions) for name in ("calls", "failures"))
            out |= {
                "tools/call_frequency": calls / len(completions),
                "tools/failure_frequency": failures / max(calls, 1),
            }
        for reward, values in zip(self._rewards, grades.T, strict=True):
            out |= {f"rewards/{reward.name}/mean": values.mean(), f"rewards/{reward.name}/std": _deviation(values)}
        return {name: float(value) for name, value in out.items()}

    def _pace(self, round_: int, completions: int) -> dict[str, float]:
        """How many completions were learned from, this round's included, and how many a second since the last one."""
        began, self._began = self._began, time.perf_counter()
        pace = {} if began is None else {"eps": completions / (self._began - began)}
        return {"episode": float((round_ + 1) * completions)} | pace

    def _record(
        self, step: int, written: Written, grades: np.ndarray, values: np.ndarray, name: str = "advantage"
    ) -> None:
        """Adds a line with the completions of the first prompt."""
        question = rewarding.question_of(self._loader.examples, int(written.chosen[0]))
        names = [reward.name for reward in self._rewards]
        answers = [
            {"text": one.text, **({"turns": one.said} if one.said else {})}
            | {"rewards": dict(zip(names, given.tolist())), name: float(value)}
            for one, given, value in list(zip(written.completions, grades, values))[: self._each]
        ]
        self._said.add(step, question.prompt.last, question.expected, answers)


def _with_rows(made: Batch, others: dict[str, np.ndarray], tokens: int) -> Batch:
    """A batch of completions, and below them other rows, whose arrays of what was sampled are 0."""
    others = others | {"ptx": (others["segment_ids"] > 0).astype(np.float32)}
    length = max(made.arrays["tokens"].shape[1], others["tokens"].shape[1])
    absent = np.zeros(others["tokens"].shape)
    arrays = {
        name: np.concatenate([_wide(array, length), _wide(others.get(name, absent).astype(array.dtype), length)])
        for name, array in made.arrays.items()
    }
    return made._replace(arrays=arrays, tokens=made.tokens + tokens)


def _wide(array: np.ndarray, length: int) -> np.ndarray:
    """[rows, length]: padded with 0."""
    return np.pad(array, [(0, 0), (0, length - array.shape[1])])


def _deviation(values: np.ndarray) -> float:
    """The sample standard deviation, as in TRL; 0 of a single one."""
    return values.std(ddof=1) if len(values) > 1 else 0.0


def lay(
    rows: Sequence[Sequence[Document]], multiple: int, most: int, arrays: Mapping[str, type[np.generic]]
) -> dict[str, np.ndarray]:
    """The arrays [rows, T] of these documents, which are as short as batches of few lengths allow.

    multiple: T is one of it, as the mesh wants. most: of T.
    """
    needed, multiple = max(sum(len(one.tokens) for one in row) for row in rows), max(_LENGTHS, multiple)
    return packing.lay(rows, min(-(-needed // multiple) * multiple, most), arrays)


def differing(rewards: np.ndarray) -> np.ndarray:
    """bool [prompts]: whether the completions of a prompt have different rewards, float64 [prompts, samples]."""
    return rewards.std(axis=1) >= _EQUAL


def most_differing(rewards: np.ndarray, count: int) -> np.ndarray:
    """int [count]: prompts in their order, those whose rewards differ, and where these are too few the first others.

    Dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2), with an end to it. rewards as of `differing`.
    """
    return np.sort(np.argsort(~differing(rewards), kind="stable")[:count])


def most_varied(rewards: np.ndarray, count: int) -> np.ndarray:
    """int [prompts, count]: of each prompt the completions whose rewards have the greatest variance, in their order.

    Which are its best and its worst ones, so many of each as give the most (PODS: Xu et al. 2025, arXiv:2504.13818,
    section 3). rewards as of `differing`.
    """
    ranked, samples = np.argsort(rewards, axis=1, kind="stable"), rewards.shape[1]
    ends = np.array([[*range(count - best), *range(samples - best, samples)] for best in range(count + 1)])
    tried = ranked[:, ends]  # [prompts, count + 1, count]
    variances = np.take_along_axis(rewards[:, None], tried, axis=2).var(axis=2)
    return np.sort(tried[np.arange(len(rewards)), variances.argmax(axis=1)], axis=1)
