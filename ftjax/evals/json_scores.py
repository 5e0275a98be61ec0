"""Scores of completions that are to be JSON, read strictly: text around it, or a key that occurs twice, is not JSON."""

from typing import Any

from ftjax import strict_json
from ftjax.evals.text_scores import expected


def fields(completion: str, example: dict) -> float:
    """The share of fields that match: of those in the completion, the expected answer or both, those equal in both.

    A field is a value that holds no others, with its path of keys and positions. Types count: "2" and 2.0 are not 2.
    What is no JSON has 0.0.
    """
    ours, theirs = _read(completion), _read(expected(example))
    if ours is None or theirs is None:
        return 0.0
    return len(ours.items() & theirs.items()) / len(ours.keys() | theirs.keys())


def exact(completion: str, example: dict) -> float:
    """1.0 where all fields match and there are no others, in any layout and order of keys."""
    return float(fields(completion, example) == 1.0)


def valid(completion: str, example: dict) -> bool:
    """Whether the completion is JSON."""
    return _read(completion) is not None


def _read(text: str) -> dict[tuple, tuple[str, Any]] | None:
    """{path: (type, value)} of the fields of JSON text; None where it is none. {} and [] are fields too."""
    try:
        return dict(_leaves(strict_json.loads(text)))
    except (ValueError, RecursionError):
        return None


def _leaves(value: Any, path: tuple = ()) -> list[tuple[tuple, tuple[str, Any]]]:
    if not isinstance(value, dict | list) or not value:
        return [(path, (type(value).__name__, None if isinstance(value, dict | list) else value))]
    members = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, member in members for leaf in _leaves(member, (*path, key))]
