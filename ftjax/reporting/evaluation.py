"""The evaluation.json of a workdir, as ftjax.evaluate writes it. What is missing there is empty here."""

import json
import math
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.errors import UserError

FILE = "evaluation.json"
_LOSS = "loss"  # the metric of rows that are not scored

Interval = tuple[float, float]


class Contestant(NamedTuple):
    """What answered the examples, such as the base with eight of them in its prompt. Means per example."""

    name: str = ""
    kind: str = "other"
    shots: int | None = None
    score: float | None = None
    interval: Interval | None = None
    valid: float | None = None
    loss: float | None = None
    prompt_tokens: float | None = None
    generated_tokens: float | None = None
    seconds: float | None = None
    cost: float | None = None  # of 1,000 answers
    note: str = ""


class Difference(NamedTuple):
    of: str = ""
    against: str = ""
    score: float | None = None
    loss: float | None = None
    interval: Interval | None = None
    prompt_tokens: float | None = None  # relative: -0.92 is 92 % fewer


class WinRate(NamedTuple):
    """How often a judge preferred the answers of one."""

    of: str = ""
    against: str = ""
    rate: float | None = None
    interval: Interval | None = None


class Answers(NamedTuple):
    """One prompt, and what each contestant said to it."""

    prompt: str = ""
    expected: str = ""
    completions: dict[str, str] = {}  # noqa: RUF012  (a NamedTuple's default, never changed)
    scores: dict[str, float] = {}  # noqa: RUF012


class ScoredSet(NamedTuple):
    """What was measured on a set of examples. Where the metric is "loss", every `score` in it is a loss."""

    name: str = ""
    metric: str = "score"
    examples: int | None = None
    verdict: str = ""
    contestants: tuple[Contestant, ...] = ()
    differences: tuple[Difference, ...] = ()
    samples: tuple[Answers, ...] = ()
    win_rate: WinRate | None = None


class Category(NamedTuple):
    """A kind of general text: cross-entropy of the base and of the tuned model in nats per token."""

    name: str = ""
    language: str = ""
    tokens: int | None = None
    base: float | None = None
    tuned: float | None = None


class Ability(NamedTuple):
    name: str = ""
    examples: int | None = None
    base: float | None = None
    tuned: float | None = None


class Drift(NamedTuple):
    layer: int = 0
    relative: float = 0.0


class Forgetting(NamedTuple):
    categories: tuple[Category, ...] = ()
    base: float | None = None
    tuned: float | None = None
    change: float | None = None
    interval: Interval | None = None
    kl: float | None = None
    abilities: tuple[Ability, ...] = ()
    drift: tuple[Drift, ...] = ()
    verdict: str = ""


class Evaluation(NamedTuple):
    step: int | None = None
    model: str = ""
    verdict: str = ""
    sets: tuple[ScoredSet, ...] = ()
    forgetting: Forgetting | None = None


def read(path: Path) -> Evaluation | None:
    """None where there is no such file; UserError that names the place of a value of another kind."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write it again with python -m ftjax.evaluate") from error
    try:
        found = _as(Evaluation, content, "the whole")
    except TypeError as error:
        raise UserError(f"{path}: {error}; write it again with python -m ftjax.evaluate") from None
    return found._replace(sets=tuple(_with_losses(its) if its.metric == _LOSS else its for its in found.sets))


def _with_losses(its: ScoredSet) -> ScoredSet:
    """A set without a score, whose losses are what is compared."""
    contestants = tuple(one._replace(score=one.loss, loss=None) for one in its.contestants)
    differences = tuple(one._replace(score=one.loss, loss=None) for one in its.differences)
    return its._replace(contestants=contestants, differences=differences)


def _as(kind: Any, value: Any, place: str) -> Any:
    """`value` as what a field's annotation says. TypeError names its place."""
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(kind, "_fields") and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        given = {name: value[name] for name in kind._fields if value.get(name) is not None}
        read = {name: _as(hints[name], content, f"{place}, {name}") for name, content in given.items()}
        return kind(**{name: content for name, content in read.items() if content is not None})
    if origin is dict and isinstance(value, dict):
        read = {name: _as(inner[1], content, f"{place}, {name}") for name, content in value.items()}
        return {name: content for name, content in read.items() if content is not None}
    if origin is tuple and isinstance(value, list):
        if inner[-1] is ... or len(value) == len(inner):
            read = tuple(_as(inner[0], content, f"{place}[{i}]") for i, content in enumerate(value))
            return None if inner[-1] is not ... and None in read else read
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None  # a mean of nothing is NaN
    elif value is None or (kind in (int, str) and type(value) is kind):
        return value
    name = getattr(kind, "__name__", str(kind))
    raise TypeError(f"{place} is {str(value)[:80]!r}, not {name}")
