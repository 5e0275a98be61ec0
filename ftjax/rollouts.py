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

from ftjax import distributed, rewarding, tree
from ftjax.assemble import Base, Program
from ftjax.atomic import write_text
from ftjax.data.batch import packing
from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Document
from ftjax.errors import UserError
from ftjax.method import method_of
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.reference import policy_and_reference
from ftjax.sampling.engine import Completion, generate
from ftjax.sampling.sampler import Sampling
from ftjax.training import metrics
from ftjax.training.source import Batch
from ftjax.training.state import TrainState
from ftjax.tree import Tree

FILE = "rollouts.jsonl"  # in the workdir: the completions of the first prompt of each round
LENGTHS = 64  # rows of a batch have a multiple of it tokens, since each length is compiled
_EQUAL = 1e-8  # rewards of a smaller standard deviation are equal, as in TRL
_LEAST = 1e-4  # added to the standard deviation of rewards, as in TRL


def check(config: ConfigDict, spec: DecoderSpec, loader: Loader) -> None:
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
    if config.rollouts.resample and "scale_rewards" not in method_of(config).settings:
        raise UserError(
            f"config.rollouts.resample={config.rollouts.resample} is for prompts whose completions have equal rewards, "
            f"of which objective.name={config.objective.name!r} learns all the same; set --config.rollouts.resample=0"
        )
    ends = [rope.long_after for rope in spec.ropes if rope.long_frequencies is not None]
    if ends and config.data.max_length > min(ends):
        raise UserError(
            f"config.data.max_length={config.data.max_length}: beyond {min(ends):.0f} tokens this model has other "
            "rotary frequencies, by the length that a completion may have in writing and that it has in training; set "
            f"--config.data.max_length={min(ends):.0f} or less"
        )
    rewarding.check(config, loader.examples)


class Written(NamedTuple):
    """The completions of a round, those of a prompt beside each other.

    Attributes:
      chosen: int [completions], the example of each.
      prompts: its tokens.
      texts: without special tokens.
    """

    chosen: np.ndarray
    prompts: Sequence[np.ndarray]
    completions: Sequence[Completion]
    texts: Sequence[str]

    def of(self, places: np.ndarray) -> "Written":
        """Those completions alone, in that order."""
        return Written(self.chosen[places], *([them[i] for i in places] for them in self[1:]))


class Rollouts:
    """The `training.source.Source` of a method whose model writes what it learns from.

    loader: of the prompts, of which a batch has config.data.batch_size / config.rollouts.samples.

    Raises:
      UserError: in `batch`, where a reward fails or is no finite number, with the row and the completion.
    """

    def __init__(self, config: ConfigDict, base: Base, program: Program, frozen: Tree, loader: Loader, workdir: Path):
        self._config, self._base, self._program, self._frozen = config, base, program, frozen
        self._loader, self._rewards, self._file = loader, rewarding.rewards_of(config), workdir / FILE
        self.updates, self.samples = config.rollouts.iterations, config.rollouts.samples
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
        every, grades = self._graded(round_, 0, state)
        total = rewarding.weighted(self._rewards, grades)
        wanted = len(total) // self.samples
        for further in range(1, self._config.rollouts.resample + 1):
            if differing(total.reshape(-1, self.samples)).sum() >= wanted:
                break
            more, their_grades = self._graded(round_, further, state)
            every = Written(np.append(every.chosen, more.chosen), *([*a, *b] for a, b in zip(every[1:], more[1:])))
            grades = np.concatenate([grades, their_grades])
            total = rewarding.weighted(self._rewards, grades)
        groups = total.reshape(-1, self.samples)
        kept = most_differing(groups, wanted)
        places = (kept[:, None] * self.samples + np.arange(self.samples)).reshape(-1)
        written = every.of(places)
        advantages = advantages_of(groups[kept], self._config.objective.scale_rewards).reshape(-1)
        if distributed.is_first():
            self._record(round_ * self.updates + 1, written, grades[places], advantages)
        arrays, found = self._lay(written, advantages), self._metrics(grades, total, every.completions)
        if self._config.rollouts.resample:
            found |= {"groups/written": float(len(groups)), "groups/kept": float(differing(groups[kept]).sum())}
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), found)

    def _graded(self, round_: int, further: int, state: TrainState) -> tuple[Written, np.ndarray]:
        """The completions of a round, or the further ones that replace some, and what each reward gives them."""
        written = self._write(round_, further, state)
        return written, rewarding.grade(self._rewards, self._loader.examples, written.chosen, written.texts)

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
        policy, _ = policy_and_reference(tree.combine(state.trainable, self._frozen))
        completions = generate(
            self._base.model,
            policy,
            prompts,
            settings.max_new_tokens,
            self._base.end_tokens,
            Sampling(settings.temperature, seed=self._config.seed),
            settings.batch_size,
            first=(round_ * (1 + settings.resample) + further) * len(chosen),
        )
        texts = [self._base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in completions]
        return Written(chosen, prompts, completions, texts)

    def _lay(self, written: Written, advantages: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of BATCH and ROLLOUT, [completions, T]: a row has a prompt with one completion."""
        documents, places = [], []
        for prompt, one in zip(written.prompts, written.completions, strict=True):
            document = whole(prompt, one)
            if self._config.objective.mask_truncated and not one.stopped:
                document.trained[:] = False
            documents.append([document])
            places.append(slice(len(prompt) - 1, len(document.tokens) - 1))  # what predicts these tokens
        longest = max(len(document.tokens) for (document,) in documents)
        multiple = max(LENGTHS, self._loader.multiple)
        length = min(-(-longest // multiple) * multiple, self._program.row_length)
        batch = packing.lay(documents, length, packing.BATCH | packing.ROLLOUT)
        for row, (place, one, advantage) in enumerate(zip(places, written.completions, advantages, strict=True)):
            batch["advantages"][row, place] = advantage
            batch["sampled_logps"][row, place] = one.logps
        for name in packing.ROLLOUT:
            batch[name] *= batch["weights"]
        return batch

    def _metrics(self, grades: np.ndarray, total: np.ndarray, completions: Sequence[Completion]) -> dict[str, float]:
        """By TRL's names."""
        groups = total.reshape(-1, self.samples)
        lengths = np.array([len(one.logps) for one in completions])
        ended = np.array([one.stopped for one in completions])
        out = {
            "reward": total.mean(),
            "reward_std": groups.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": (~differing(groups)).mean(),
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
        self, step: int, written: Written, grades: np.ndarray, values: np.ndarray, name: str = "advantage"
    ) -> None:
        """Adds a line with the completions of the first prompt; lines of later steps, of a run that was killed, go."""
        if not self._writes_on:
            earlier = [record for record in metrics.read(self._file) if record["step"] < step]
            write_text(self._file, "".join(map(_line, earlier)))
            self._writes_on = True
        question = rewarding.question_of(self._loader.examples, int(written.chosen[0]))
        names = [reward.name for reward in self._rewards]
        answers = [
            {"text": text, "rewards": dict(zip(names, given.tolist())), name: float(value)}
            for text, given, value in list(zip(written.texts, grades, values))[: self.samples]
        ]
        record = {"step": step, "prompt": question.prompt.last, "expected": question.expected, "completions": answers}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(record))


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def whole(prompt: np.ndarray, completion: Completion) -> Document:
    """A prompt with its completion and the end token where there is one, which are trained."""
    stop = () if completion.stop_token is None else (completion.stop_token,)
    tokens = np.concatenate([prompt, np.array([*completion.tokens, *stop], np.int32)])
    return Document(tokens, np.arange(len(tokens)) >= len(prompt))


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


def differing(rewards: np.ndarray) -> np.ndarray:
    """bool [prompts]: whether the completions of a prompt have different rewards, float64 [prompts, samples]."""
    return rewards.std(axis=1) >= _EQUAL


def most_differing(rewards: np.ndarray, count: int) -> np.ndarray:
    """int [count]: prompts in their order, those whose rewards differ, and where these are too few the first others.

    Dynamic sampling (Yu et al. 2025, arXiv:2503.14476, section 3.2), with an end to it. rewards as of `differing`.
    """
    return np.sort(np.argsort(~differing(rewards), kind="stable")[:count])
