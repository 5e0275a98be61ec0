"""The form of answers, as training answers show it: what a valid answer looks like, right or wrong."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ftjax import strict_json

_FEW = 20  # different answers, at most, that are a choice
_REPEATED = 5  # times, on average, that each of them occurs
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?|[-+]?\.\d+")


class Format(NamedTuple):
    """A form that all training answers have.

    Attributes:
      name: such as "a JSON object with the keys order and item".
      detail: the same with what is known of its parts, for instructions; may be the name.
      matches: whether a text has it, but for white space around it.
    """

    name: str
    detail: str
    matches: Callable[[str], bool]


def of_answers(answers: Sequence[str]) -> Format | None:
    """The form of all `answers`: JSON objects with their keys, other JSON, numbers, a choice; None where it is none."""
    values = [_json(answer) for answer in answers]
    if not answers:
        return None
    if all(isinstance(value, dict) for value in values):
        return _of_objects(values)
    if all(isinstance(value, list) for value in values):
        return Format("a JSON list", "a JSON list", lambda text: isinstance(_json(text), list))
    if all(_NUMBER.fullmatch(answer.strip()) for answer in answers):
        return Format("a number", "a number", lambda text: bool(_NUMBER.fullmatch(text.strip())))
    choices = sorted({answer.strip() for answer in answers})
    if len(choices) <= _FEW and len(choices) * _REPEATED <= len(answers):
        name = f"one of {_listed(choices, 'or')}"
        return Format(name, name, lambda text: text.strip() in choices)
    return None


def _of_objects(values: Sequence[dict]) -> Format:
    """Objects that have every key which all of `values` have, and none that no one has."""
    known = dict.fromkeys(key for value in values for key in value)
    needed = {key for key in known if all(key in value for value in values)}

    def matches(text: str) -> bool:
        value = _json(text)
        return isinstance(value, dict) and needed <= value.keys() <= known.keys()

    optional = [key for key in known if key not in needed]
    keys = f"the key{'s' if len(known) > 1 else ''} {_listed(list(known), 'and')}" if known else "no key"
    name = f"a JSON object with {keys}"
    name += f" ({_listed(optional, 'and')} may be missing)" if optional else ""
    parts = [f'"{key}": {_of_part([value[key] for value in values if key in value])}' for key in known]
    return Format(name, f"{name}: {{{', '.join(parts)}}}", matches)


def _of_part(values: Sequence[Any]) -> str:
    """What is known of the values of a key, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    names = sorted({kinds.get(type(value), "null") for value in values})
    choices = sorted(set(values)) if names == ["text"] else []
    if choices and len(choices) <= _FEW and len(choices) * _REPEATED <= len(values):
        return _listed([f'"{choice}"' for choice in choices], "or")
    return " or ".join(names)


def _listed(names: Sequence[str], last: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _json(text: str) -> Any:
    """The value of JSON text; NaN, which JSON does not have, where it is none."""
    try:
        return strict_json.loads(text)
    except (ValueError, RecursionError):
        return math.nan
