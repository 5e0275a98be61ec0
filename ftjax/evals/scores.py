"""Scores of a completion by name, and those of a person's own function: `score` of an entry in `data.eval`.

A score is a function of the completion and the example: the row's own fields, and under "messages" the conversation,
which ends with the expected answer where there is one. The score of a task (`ftjax/tasks/`) has the same form, and so
has that of a reward model (`ftjax.rewards`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax import named, rewards
from ftjax.config import GRADER, REWARD
from ftjax.errors import UserError, did_you_mean
from ftjax.evals import graders, json_scores, placeholders, python_tests, text_scores
from ftjax.evals.entries import LIKELY


class Score(NamedTuple):
    """How completions are scored.

    Attributes:
      function: (completion, example) -> a number; the higher, the better.
      needs_answer: it compares with the expected answer, so that a row must have one.
      valid: (completion, example) -> whether the completion has the form that is wanted, right or wrong; None: any has.
      check: of an example, before anything is scored: UserError where the score cannot read it. None: it reads any.
      runs_code: it runs what the model wrote.
      side_by_side: it waits for others, a process or a reply, so that several are asked for at once.
      binary: it is 0 or 1, so that several samples of a prompt have a pass@k.
      together: (completions, examples) -> the numbers of all at once, in every process, where that is how it is
        computed; None: one by one, in one process.
      share: its mean is shown in percent.
      model: the directory of the model that gives it, if one does; another one's numbers do not compare.
    """

    function: Callable[[str, dict], float]
    needs_answer: bool = True
    valid: Callable[[str, dict], bool] | None = None
    check: Callable[[dict], None] | None = None
    runs_code: bool = False
    side_by_side: bool = False
    binary: bool = False
    together: Callable[[Sequence[str], Sequence[dict]], list[float]] | None = None
    share: bool = True
    model: str = ""


def _comparing(function: Callable[[str, dict], float], what: str, **fields: Any) -> Score:
    """A score that compares `what`. Where the expected answer itself does not score 1, it is none."""

    def check(example: dict) -> None:
        answer = text_scores.expected(example)
        if (value := function(answer, example)) < 0.999999:  # a sum of floating-point numbers
            raise UserError(f"its own answer {answer!r} scores {value:g}, not 1: the score compares {what}")

    return Score(function, check=check, **fields)


_JSON = "JSON, with nothing around it"

SCORES = {
    "exact": Score(text_scores.exact, binary=True),
    "f1": Score(text_scores.f1),
    "rouge_l": _comparing(text_scores.rouge_l, "words of the letters a to z and digits; use 'chrf' for others"),
    "chrf": _comparing(text_scores.chrf, "text"),
    "json": _comparing(json_scores.fields, _JSON, valid=json_scores.valid),
    "json_exact": _comparing(json_scores.exact, _JSON, valid=json_scores.valid, binary=True),
    "python": Score(
        python_tests.passes,
        needs_answer=False,
        valid=python_tests.valid,
        check=python_tests.check,
        runs_code=True,
        binary=True,
    ),
}


def find(name: str, where: str) -> Score:
    """The score called `name`, that of the reward model which reward:PATH names, of the grader which grader:FILE
    describes, or the function that MODULE:FUNCTION names; UserError with `where` for others."""
    if name in SCORES:
        return SCORES[name]
    module, colon, function = name.partition(":")
    if module == REWARD and colon:
        return _of_reward_model(function, where)
    if module == GRADER and colon:
        return _of_grader(function, where)
    if not colon:
        meant = did_you_mean(name, [*SCORES, *LIKELY])
        raise UserError(f"{where}: there is no score {name!r}{meant}; a function of your own is MODULE:FUNCTION")
    return Score(named.find(name, f"{where}: score"), needs_answer=False)


def _of_grader(path: str, where: str) -> Score:
    """What a grader of OpenAI's gives (`evals.graders`); an answer that it cannot grade is worth 0."""
    grader, judges = graders.read(path, where)

    def function(completion: str, example: dict) -> float:
        return graders.grade(grader, completion, example, judges).reward

    def check(example: dict) -> None:
        for name in graders.fields(grader):
            placeholders.find(name, {"item": example})

    # What runs is the grader's own code, which is confined; side by side, and judges are asked so, too.
    return Score(function, needs_answer=False, check=check, side_by_side=True, share=False)


def _of_reward_model(name: str, where: str) -> Score:
    """The reward by the reward model of `name` as a score of completions; it is loaded with the first of them.

    name: PATH, the mean over its heads; PATH?min, the smallest of them; PATH?std=C, their mean less C times their
    standard deviation. Where heads disagree, a policy finds what one of them is wrong about. where: for messages, what
    names it.
    """
    path, _, of_heads = name.partition("?")
    over = _over_heads(of_heads, f"{where}: score 'reward:{name}'")
    if not Path(path).expanduser().is_dir():
        raise UserError(f"{where}: score 'reward:{path}': no such directory; name a run, an export or an adapter")
    where_it_is = str(Path(path).expanduser().absolute())

    def together(completions: Sequence[str], examples: Sequence[dict]) -> list[float]:
        model = _loaded(where_it_is)
        documents = []
        for completion, example in zip(completions, examples, strict=True):
            turns = example["messages"]
            prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            turns = [*prompt, {"role": "assistant", "content": completion}]
            documents.append(model.tokens(turns, example.get("tools")))
        if of_heads and model.heads == 1:
            raise UserError(
                f"{where}: score 'reward:{name}': this reward model has one head, which agrees with itself; train one "
                f"with --config.objective.ensemble=4, or name reward:{path}"
            )
        return over(model.scores_of(documents).astype(np.float64)).tolist()

    def alone(completion: str, example: dict) -> float:
        return together([completion], [example])[0]

    return Score(
        alone, needs_answer=False, together=together, share=False, model=where_it_is + (of_heads and f"?{of_heads}")
    )


def _over_heads(name: str, what: str) -> Callable[[np.ndarray], np.ndarray]:
    """float64 [N, K] -> [N], of what stands behind the path of a reward model."""
    if not name:
        return lambda rewards: rewards.mean(axis=1)
    if name == "min":  # Coste et al. 2023 (arXiv 2310.02743), section 3.2, worst-case optimization
        return lambda rewards: rewards.min(axis=1)
    kind, _, value = name.partition("=")
    with contextlib.suppress(ValueError):
        if kind == "std" and 0 < (c := float(value)) < math.inf:
            return lambda rewards: rewards.mean(axis=1) - c * rewards.std(axis=1)
    raise UserError(f"{what}: {name!r} is neither 'min' nor 'std=C' with a number C above 0, such as 'std=1'")


@functools.cache
def _loaded(path: str) -> rewards.RewardModel:
    """Once for all entries that it scores, of training and of evaluation."""
    return rewards.load(path)


def checked(value: object, where: str) -> float:
    """The number that a score gave; UserError for anything else, NaN included."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: the score is {value!r}; it must be a finite number")
    return number


def pass_at(k: int, passed: int, samples: int) -> float:
    """pass@k of one prompt: the chance that of k of its samples, drawn without replacement, one passes at least.

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, section 2.1), 1 - C(n - c, k) / C(n, k).
    """
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
