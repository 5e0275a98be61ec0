"""What a value of the config must be, and how that is said."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ftjax.errors import UserError, did_you_mean


class Check(NamedTuple):
    """What a value must be."""

    holds: Callable[[Any], Any]
    wanted: str


def one_of(*values: str) -> Check:
    return Check(lambda value: value in values, f"one of {', '.join(values)}")


def number(low: float, high: float = math.inf) -> Check:
    wanted = f"a number from {low:g} to {high:g}" if high < math.inf else f"a finite number, {low:g} or more"
    return Check(lambda value: math.isfinite(value) and low <= value <= high, wanted)


def pairs(kind: type) -> Check:
    def holds(value: Any) -> bool:
        entries = [entry for entry in value if isinstance(entry, tuple | list) and len(entry) == 2]
        fits = [type(pattern) is str and type(number) in (int, kind) and number > 0 for pattern, number in entries]
        return len(entries) == len(value) and all(fits)

    return Check(holds, f"pairs of a regular expression and a positive {kind.__name__}, such as (('self_attn', 8),)")


def tokens() -> Check:
    def holds(value: Any) -> bool:
        plain = all(type(token) is str and token and token == token.strip() for token in value)
        return plain and len(set(value)) == len(value)

    return Check(holds, "different tokens without white space around them, such as ('<|call|>',)")


def names() -> Check:
    def holds(value: Any) -> bool:
        return all(type(name) is str and name for name in value) and len(set(value)) == len(value) != 1

    return Check(holds, "two or more different names, such as ('spam', 'other')")


def some_of(*names: str) -> Check:
    def holds(value: Any) -> bool:
        return all(name in names for name in value) and len(set(value)) == len(value)

    return Check(holds, f"some of {', '.join(names)}")


def named() -> Check:
    return Check(lambda value: not value or _names(value), "MODULE:NAME, such as 'my_game:Guess'")


def all_named() -> Check:
    def holds(value: Any) -> bool:
        return all(map(_names, value)) and len(set(value)) == len(value)

    return Check(holds, "different functions, each MODULE:NAME, such as ('my_tools:add',)")


def _names(value: Any) -> bool:
    return isinstance(value, str) and all(value.partition(":"))


def losses() -> Check:
    wanted = "names, or pairs of a name and a positive weight, such as ('sigmoid', ('sft', 0.2))"
    return _weighted(lambda weight: 0 < weight < math.inf, wanted)


def rewards() -> Check:
    wanted = "names, or pairs of a name and a weight other than 0, such as ('exact', ('my_rewards:long', -0.1))"
    return _weighted(lambda weight: weight != 0 and math.isfinite(weight), wanted)


def _weighted(fits: Callable[[float], bool], wanted: str) -> Check:
    """Names, each alone or in a pair with a weight that fits."""

    def holds(value: Any) -> bool:
        entries = [(entry, 1.0) if isinstance(entry, str) else entry for entry in value]
        are_pairs = all(isinstance(entry, tuple | list) and len(entry) == 2 for entry in entries)
        return are_pairs and all(
            type(name) is str and type(weight) in (int, float) and fits(weight) for name, weight in entries
        )

    return Check(holds, wanted)


ANY = Check(lambda value: True, "anything")


def _is_layers(text: str) -> bool:
    parts = [part.split("-") for part in text.split(",")]
    return not text or all(
        len(ends) < 3 and all(end.isdecimal() for end in ends) and int(ends[0]) <= int(ends[-1]) for ends in parts
    )


LAYERS = Check(_is_layers, "numbers and ranges of layers, such as '0-7,20'")

# The options of an entry in data.train, data.eval and the like.
ENTRY_OPTIONS = {
    "source": Check(lambda value: isinstance(value, str), "a string"),
    "format": Check(lambda value: isinstance(value, str), "a string"),
    "split": Check(lambda value: isinstance(value, str), "a string"),
    "weight": Check(lambda value: type(value) in (int, float) and 0 < value < math.inf, "a positive, finite number"),
    "replay": Check(lambda value: type(value) is float and 0 < value < 1, "a share between 0 and 1, such as 0.2"),
    "limit": Check(lambda value: type(value) is int and value > 0, "a positive whole number"),
    "columns": Check(
        lambda value: hasattr(value, "items") and value and all(isinstance(s, str) for s in (*value, *value.values())),
        "a mapping from our names to the source's, such as {'prompt': 'question', 'completion': 'answer'}",
    ),
    "score": Check(lambda value: isinstance(value, str) and value, "the name of a score, or MODULE:FUNCTION"),
}


def source_entry(entry: Any, key: str) -> dict[str, Any]:
    """One entry of data.train or data.eval, a string or a mapping, as a dict of "source" and, where given, options.

    Options: "format" and "split" (strings), "weight" (how many times an epoch has each row), "replay" (instead, the
    share of an epoch's trained tokens that are the source's), "limit" (rows at most), "columns" (our names of columns
    -> the source's), "score" (data.eval: how completions are scored).
    """
    if isinstance(entry, str):
        return {"source": entry}
    if not hasattr(entry, "keys") or not isinstance(entry.get("source"), str):
        raise UserError(f"config.{key}: {entry!r} is neither a string nor a mapping with a 'source'")
    for name, value in entry.items():
        if name not in ENTRY_OPTIONS:
            raise UserError(
                f"config.{key}: entry {dict(entry)} has no option {name!r}{did_you_mean(name, ENTRY_OPTIONS)}"
            )
        if name == "score" and key != "data.eval":
            raise UserError(f"config.{key}: entry {dict(entry)}: a score is for data.eval; leave it out here")
        check = ENTRY_OPTIONS[name]
        if not check.holds(value):
            raise UserError(f"config.{key}: {name!r} of entry {dict(entry)} must be {check.wanted}")
    return {name: dict(value) if name == "columns" else value for name, value in entry.items()}


def check_together(given: Mapping[str, Any]) -> None:
    """UserError where values do not go together. given: those of a config by their dotted keys."""
    if given["data.batch_size"] % max(given["accumulate"], 1):
        raise UserError(
            f"config.data.batch_size={given['data.batch_size']} is not a multiple of config.accumulate="
            f"{given['accumulate']}; every micro-batch has the same number of rows"
        )
    if given["eval_every"] and given["eval_epochs"]:
        raise UserError(
            f"config.eval_every={given['eval_every']} steps and config.eval_epochs={given['eval_epochs']:g} epochs "
            "both say how often to evaluate; set one of them to 0"
        )
    if given["evaluate.samples"] > 1 and not given["evaluate.temperature"]:
        raise UserError(
            f"config.evaluate.samples={given['evaluate.samples']} at config.evaluate.temperature=0 are all the same "
            "answer; set config.evaluate.temperature, such as to 0.8"
        )


def is_endpoint(name: str) -> bool:
    """Whether a model is named by the URL of an OpenAI-compatible endpoint."""
    return name.startswith(("http://", "https://"))


def check_replay(sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """UserError where the option "replay" does not say how often a row is seen. sources: the entries of data.train,
    data.eval, ... by "train", "eval", ..."""
    for which, entries in sources.items():
        if which != "train" and (wrong := [entry["source"] for entry in entries if "replay" in entry]):
            raise UserError(
                f"config.data.{which}: {wrong[0]} has the option 'replay', which is for data.train; leave it out"
            )
    train = sources["train"]
    if both := [entry["source"] for entry in train if {"weight", "replay"} <= entry.keys()]:
        raise UserError(f"config.data.train: 'weight' and 'replay' of {both[0]} both say how often; leave one out")
    total = sum(entry.get("replay", 0) for entry in train)
    if total >= 1 or (train and all("replay" in entry for entry in train)):
        raise UserError(
            f"config.data.train: the shares 'replay' are {total:g} together, beside {len(train)} sources in all; they "
            "must leave room for a source without, which the run is to learn"
        )


def check_type(key: str, value: Any, default: Any) -> None:
    wanted = type(default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if wanted is float else type(value) is wanted
    if wanted is tuple:
        fits = isinstance(value, tuple | list)
    if not fits:
        raise UserError(f"config.{key}={value!r} is {type(value).__name__}; it must be {wanted.__name__}")
