"""The best of several completions by a reward, as a command line asks for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import prompts
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import scored
from ftjax.evals.scored import Question, ScoredSet


class Best(NamedTuple):
    """A prompt's best completion, the first of equals, and what it is worth."""

    text: str
    reward: float


def questions_of(source: str, reward: str, run_code: bool) -> ScoredSet:
    """The prompts of a .txt file, or of the rows of a file in any format but text, with what the reward `reward` sees.

    Raises:
      UserError: no such reward, one that runs code without `run_code`, or a row that it cannot score.
    """
    how = scored.score_of(reward, source, True, "--reward")
    if how.runs_code and not run_code:
        raise UserError(
            f"--reward {reward} runs what the model writes, on this machine and with few guards (docs/evaluation.md); "
            "allow it with --run_code"
        )
    if Path(source).suffix == ".txt":
        asked = [Question(one, {"messages": [_user(one)]}) for one in prompts.of_file(source)]
    else:
        rows = read_sources([{"source": source}])
        checked = [rows[i] for i in range(len(rows))]
        if texts := [row for row in checked if "text" in row.fields]:
            raise UserError(f"{texts[0].origin}: is text to be continued, which no reward judges; leave out --best_of")
        asked = [scored.question_of(row, rows.raw(i)) for i, row in enumerate(checked)]
    for question in asked:
        scored.check(how, reward, question)
    return ScoredSet("prompts", reward, asked, how)


def _user(prompt: prompts.Prompt) -> dict:
    return {"role": "user", "content": prompt.last}


def best(rewarded: ScoredSet, texts: Sequence[str], samples: int) -> list[Best]:
    """Of each question the best of its completions. texts: [questions * samples], those of a question side by side."""
    asked = [question for question in rewarded.questions for _ in range(samples)]
    rewards = np.array(rewarded.grade_all(texts, asked)).reshape(-1, samples)
    chosen = rewards.argmax(axis=1)
    return [Best(texts[i * samples + k], float(rewards[i, k])) for i, k in enumerate(chosen)]
