"""Whether a model still does what it is told about the form of its answer: checks that code can make."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ftjax.errors import UserError, did_you_mean
from ftjax.evals.general import FOLDER


class Instruction(NamedTuple):
    """A prompt, and what its answer must be: `check` of CHECKS with `value`."""

    prompt: str
    check: str
    value: Any


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_list(text: str, length: int) -> bool:
    value = _parsed(text)
    return isinstance(value, list) and len(value) == length


def _has_keys(text: str, keys: list[str]) -> bool:
    value = _parsed(text)
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def _has_bullets(text: str, count: int) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == count and all(line.startswith("- ") for line in lines)


# (the answer without white space around it, the value) -> whether it is as it must be
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words": lambda text, count: len(text.split()) == count,
    "at_most_words": lambda text, count: 0 < len(text.split()) <= count,
    "one_of": lambda text, answers: text in answers,
    "json_keys": _has_keys,
    "json_list": _is_list,
    "upper": lambda text, _: text.upper() == text and text.lower() != text,
    "lower": lambda text, _: text.lower() == text and text.upper() != text,
    "bullets": _has_bullets,
    "begins_with": lambda text, start: text.startswith(start),
    "ends_with": lambda text, end: text.endswith(end),
    "contains": lambda text, part: part.lower() in text.lower(),
    "without": lambda text, part: bool(text) and part.lower() not in text.lower(),
    "digits": lambda text, _: text.isdecimal(),
    "commas": lambda text, count: len(parts := text.split(",")) == count and all(part.strip() for part in parts),
}


def shipped() -> list[Instruction]:
    """The 24 that come with this package."""
    lines = (FOLDER / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Instruction(**json.loads(line)) for line in lines]


def follows(completion: str, instruction: Instruction) -> bool:
    """Whether a completion has the form that was asked for; UserError for a check that there is none of."""
    if instruction.check not in CHECKS:
        raise UserError(f"there is no check {instruction.check!r}{did_you_mean(instruction.check, CHECKS)}")
    return CHECKS[instruction.check](completion.strip(), instruction.value)
