"""Scores of a completion by name, and those of a person's own function: `score` of an entry in `data.eval`.

A score is a function of the completion and the example: the row's own fields, and under "messages" the conversation,
which ends with the expected answer where there is one. The score of a task (`ftjax/tasks/`) has the same form.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

from ftjax.errors import UserError, did_you_mean


class Score(NamedTuple):
    """How completions are scored.

    Attributes:
      function: (completion, example) -> a number; the higher, the better.
      needs_answer: it compares with the expected answer, so that a row must have one.
      valid: (completion, example) -> whether the completion has the form that is wanted, right or wrong; None: any has.
    """

    function: Callable[[str, dict], float]
    needs_answer: bool = True
    valid: Callable[[str, dict], bool] | None = None


def expected(example: dict) -> str:
    """The answer that a row gives."""
    return example["messages"][-1]["content"]


def exact(completion: str, example: dict) -> float:
    """1.0 where the completion is the expected answer, but for white space around it."""
    return float(completion.strip() == expected(example).strip())


SCORES = {"exact": Score(exact)}


def find(name: str, where: str) -> Score:
    """The score called `name`, or the function that MODULE:FUNCTION names; UserError with `where` for others."""
    if name in SCORES:
        return SCORES[name]
    module, colon, function = name.partition(":")
    if not colon:
        meant = did_you_mean(name, SCORES)
        raise UserError(f"{where}: there is no score {name!r}{meant}; a function of your own is MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"{where}: score {name!r}: {error}; is {module} where Python finds modules?") from error
    if not callable(found):
        raise UserError(f"{where}: score {name!r}: {module} has no function {function!r}")
    return Score(found, needs_answer=False)


def checked(value: object, where: str) -> float:
    """The number that a score gave; UserError for anything else, NaN included."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: the score is {value!r}; it must be a finite number")
    return number
