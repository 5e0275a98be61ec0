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
from ftjax.environments import ENVIRONMENT
from ftjax.episodes import Episode
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
      scores: that of the rows of each entry of data.train; [] of a judge, and where the environment says it.
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
    if config.rollouts.environment:
        named = named or [(ENVIRONMENT, 1.0)]
    elif ENVIRONMENT in dict(named):
        raise UserError(f"{where}: {ENVIRONMENT!r} is what config.rollouts.environment gives, which names none")
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
        Reward(
            name,
            weight,
            [] if name == ENVIRONMENT else [scored.score_of(name, source, run_code, where) for source in entries],
        )
        for name, weight in named or [(TASK_SCORE, 1.0)]
    ]


def _has_own(source: str) -> bool:
    return source.startswith(TASK) and hasattr(registry.get(source.removeprefix(TASK)), "score")


def check(config: ConfigDict, examples: Examples) -> None:
    """UserError where the rows of data.train cannot be rewarded."""
    rewards = rewards_of(config)
    for i in spread(len(examples), _CHECKED).tolist():
        for reward in (one for one in rewards if one.scores):
            scored.check(reward.scores[examples.source_ids[i]], reward.name, question_of(examples, i))


def question_of(examples: Examples, index: int) -> Question:
    return scored.question_of(examples.row(index), examples.raw(index))


def grade(rewards: Sequence[Reward], examples: Examples, chosen: np.ndarray, episodes: Sequence[Episode]) -> np.ndarray:
    """float64 [episodes, rewards]: what each reward gives to episodes of these examples, the same on all hosts.

    A score is told the text of the last turn, and in its example the conversation before that; the expected answer
    stands at its end as it does in a row.

    Raises:
      UserError: a reward that fails or is no finite number, with the row and the completion.
    """
    questions = {i: question_of(examples, i) for i in np.unique(chosen).tolist()}
    out = np.zeros((len(chosen), len(rewards)))
    for column, reward in enumerate(rewards):
        if reward.judge is not None:
            asked = [questions[i] for i in chosen.tolist()]
            out[:, column] = judging.wins(reward.judge, asked, [one.text for one in episodes], reward.samples)
        elif not reward.scores:
            out[:, column] = [one.reward for one in episodes]
        for source, how in enumerate(reward.scores):
            rows = np.flatnonzero(examples.source_ids[chosen] == source)
            if not len(rows):
                continue
            its = ScoredSet("rollouts", reward.name, (), how)
            # By one process: programs, and functions that ask elsewhere, may not give the same to each.
            is_mine = how.together is not None or distributed.is_first()
            asked = [_after(questions[int(chosen[row])], episodes[row]) for row in rows]
            found = json.dumps(its.grade_all([episodes[row].text for row in rows], asked)) if is_mine else None
            out[rows, column] = json.loads(distributed.tell(found, limit=distributed.LOADING_SECONDS))
    return out


def _after(question: Question, episode: Episode) -> Question:
    """The question that the last turn of an episode answers."""
    if not episode.said:
        return question
    turns = question.example["messages"]
    prompt, answer = (turns[:-1], turns[-1:]) if turns[-1]["role"] == "assistant" else (turns, [])
    return question._replace(example=question.example | {"messages": [*prompt, *episode.said[:-1], *answer]})


def weighted(rewards: Sequence[Reward], grades: np.ndarray) -> np.ndarray:
    """float64 [completions]: the sum that counts, of `grade`."""
    return grades @ np.array([reward.weight for reward in rewards])
