"""Scores of a completion by name, and those of a person's own function: `score` of an entry in `data.eval`.

A score is a function of the completion and the example: the row's own fields, and under "messages" the conversation,
which ends with the expected answer where there is one. The score of a task (`ftjax/tasks/`) has the same form, and so
has one that asks a reward model.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

from ftjax.errors import UserError, did_you_mean
from ftjax.evals import json_scores, text_scores


class Score(NamedTuple):
    """How completions are scored.

    Attributes:
      function: (completion, example) -> a number; the higher, the better.
      needs_answer: it compares with the expected answer, so that a row must have one.
      valid: (completion, example) -> whether the completion has the form that is wanted, right or wrong; None: any has.
      compares: what an expected answer must be, where not any can be compared with; such a score gives 1 to the
        expected answer itself, which is checked.
    """

    function: Callable[[str, dict], float]
    needs_answer: bool = True
    valid: Callable[[str, dict], bool] | None = None
    compares: str = ""


_JSON = "JSON, with nothing around it"

SCORES = {
    "exact": Score(text_scores.exact),
    "f1": Score(text_scores.f1),
    "rouge_l": Score(text_scores.rouge_l, compares="words of the letters a to z and digits; 'chrf' reads any"),
    "chrf": Score(text_scores.chrf, compares="text"),
    "json": Score(json_scores.fields, valid=json_scores.valid, compares=_JSON),
    "json_exact": Score(json_scores.exact, valid=json_scores.valid, compares=_JSON),
}


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
