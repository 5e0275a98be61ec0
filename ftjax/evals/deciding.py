"""What decides which step of a run is best: a metric, or a sum of metrics with factors (`config.evaluate.best`)."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ftjax.errors import UserError, did_you_mean
from ftjax.evals.general import METRICS

# A factor, "*", a sign, or the name of a metric, in which signs may stand: eval_my-rows/score.
_TOKEN = re.compile(
    r"\s*(?:(?P<factor>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<sign>[-+*])|(?P<name>[^\s*]+))"
)
_SHAPE = "eval_loss, eval_NAME/score, or a sum such as 'eval_a/score - 0.5 * eval_general/change'"
# What is better the smaller it is, by the last word of its name; and what is neither better small nor large.
_SMALLER = ("loss", "cross_entropy", "perplexity", "nll", "kl", "change", "router_load", "router_idle")
_NEITHER = re.compile(r"^eval_(entropy$|router_(balance|z)$|logps/|logits/|rewards/(chosen|rejected))")


class Deciding(NamedTuple):
    """A sum of metrics, and which values of it are better."""

    text: str  # as it was written, without min: or max:
    terms: tuple[tuple[float, str], ...]  # (factor, name of the metric)
    mode: str  # "max" or "min"

    def value(self, record: Mapping[str, Any]) -> float | None:
        """Its value in a record of metrics.jsonl; None where one of its metrics is not in it."""
        if any(name not in record for _, name in self.terms):
            return None
        return float(sum(factor * record[name] for factor, name in self.terms))

    def improves(self, value: float, on: float, by: float) -> bool:
        """Whether `value` is better than `on` by more than `by`; NaN never is."""
        return (value - on if self.mode == "max" else on - value) > by

    def check(self, record: Mapping[str, Any]) -> None:
        """UserError where a metric is not in the record of an evaluation; it names those that are."""
        there = [name for name in record if name.startswith("eval_")]
        for _, name in self.terms:
            if name not in record:
                raise UserError(f"config.evaluate.best: this run measures no {name}{did_you_mean(name, there)}")


def parse(text: str) -> Deciding:
    """Reads [min:|max:] TERM [(+|-) TERM ...], each TERM a metric, FACTOR * metric or metric * FACTOR.

    Without min: or max: the metrics say which is better: losses are better small, scores large, if all terms agree.

    Raises:
      UserError: it is no such sum, or the direction cannot be told.
    """
    given, body = re.fullmatch(r"\s*(?:(min|max):)?(.*)", text, re.DOTALL).groups()
    tokens = [(match.lastgroup, match[match.lastgroup]) for match in _TOKEN.finditer(body.rstrip())]

    def refuse(why: str) -> UserError:
        return UserError(f"config.evaluate.best={text!r}: {why}; it is {_SHAPE}, with blanks around + and -")

    terms, position = [], 0
    while position < len(tokens):
        factor = 1.0
        if tokens[position] in (("sign", "+"), ("sign", "-")):
            factor = -1.0 if tokens[position][1] == "-" else 1.0
            position += 1
        elif terms:
            raise refuse(f"there is no + or - before {tokens[position][1]!r}")
        product = tokens[position : position + 1]
        if tokens[position + 1 : position + 2] == [("sign", "*")]:
            product += tokens[position + 2 : position + 3]
            position += 2
        position += 1
        kinds = sorted(kind for kind, _ in product)
        if kinds not in (["name"], ["factor", "name"]):
            raise refuse("a term is a metric, or a number * a metric")
        values = dict(product)
        if not values["name"].startswith("eval_"):
            raise refuse(f"{values['name']!r} is no metric of an evaluation, whose names begin with eval_")
        terms.append((factor * float(values.get("factor", 1)), values["name"]))
    if not terms:
        raise refuse("it names no metric")
    mode = given or _direction(terms)
    if mode is None:
        raise UserError(
            f"config.evaluate.best={text!r}: whether more of it is better cannot be told from its metrics; write "
            f"'max:{body.strip()}' or 'min:{body.strip()}'"
        )
    return Deciding(body.strip(), tuple(terms), mode)


def smaller_is_better(name: str) -> bool:
    """Whether a metric is better the smaller it is: losses, divergences, and all of general text."""
    last = name.removeprefix("eval_").rpartition("/")[2]
    return name.startswith(METRICS) or any(last == word or last.endswith(f"_{word}") for word in _SMALLER)


def _direction(terms: Iterable[tuple[float, str]]) -> str | None:
    """Which values of a sum are better, where its terms agree."""
    found = set()
    for factor, name in terms:
        small = smaller_is_better(name)
        found.add(None if _NEITHER.match(name) else "min" if small == (factor > 0) else "max")
    return found.pop() if len(found) == 1 else None
