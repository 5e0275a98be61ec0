"""What completions are worth: the rewards that config.objective.rewards names, and what each gives."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed, judging
from ftjax.data.audit.checks import spread
from ftjax.data.read.sources import TASK
from ftjax.data.tokens.examples import Examples
from ftjax.errors import UserError
from ftjax.evals import scored
from ftjax.evals.entries import TASK_SCORE
from ftjax.evals.judge import Judge
from ftjax.evals.scored import Question, ScoredSet
from ftjax.evals.scores import Score
from ftjax.tasks import registry

_CHECKED = 2000  # rows of which it is seen beforehand whether they can be rewarded


class Reward(NamedTuple):
    """One of the rewards whose weighted sum counts.

    Attributes:
      scores: that of the rows of each entry of data.train; [] of a judge.
      judge: compares the completions of a prompt, of which there are `samples`; None of a score.
    """

    name: str
    weight: float
    scores: list[Score]
    judge: Judge | None = None
    samples: int = 1


def rewards_of(config: ConfigDict) -> list[Reward]:
    """What config.objective.rewards names; a task's own score where it names nothing. With config.objective.judge its
    judgements are the only reward.

    Raises:
      UserError: a score that is not there, or that a source does not have; a judge that is not there.
    """
    if config.objective.judge:
        return [Reward(judging.NAME, 1.0, [], judging.judge_of(config), config.rollouts.samples)]
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


def check(config: ConfigDict, examples: Examples) -> None:
    """UserError where the rows of data.train cannot be rewarded."""
    rewards = rewards_of(config)
    for i in spread(len(examples), _CHECKED).tolist():
        for reward in rewards if not config.objective.judge else ():
            scored.check(reward.scores[examples.source_ids[i]], reward.name, question_of(examples, i))


def question_of(examples: Examples, index: int) -> Question:
    return scored.question_of(examples.row(index), examples.raw(index))


def grade(rewards: Sequence[Reward], examples: Examples, chosen: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """float64 [completions, rewards]: what each reward gives to completions of these examples, the same on all hosts.

    Raises:
      UserError: a reward that fails or is no finite number, with the row and the completion.
    """
    questions = {i: question_of(examples, i) for i in np.unique(chosen).tolist()}
    out = np.zeros((len(chosen), len(rewards)))
    for column, reward in enumerate(rewards):
        if reward.judge is not None:
            asked = [questions[i] for i in chosen.tolist()]
            out[:, column] = judging.wins(reward.judge, asked, texts, reward.samples)
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


def weighted(rewards: Sequence[Reward], grades: np.ndarray) -> np.ndarray:
    """float64 [completions]: the sum that counts, of `grade`."""
    return grades @ np.array([reward.weight for reward in rewards])
