"""JSON read strictly: what Python's reader lets pass and other readers take differently is refused."""

import json
from typing import Any


class RepeatedKey(ValueError):
    """An object has a key twice. Readers differ in which of the two they take, so nobody can know what was meant."""


def loads(text: str | bytes) -> Any:
    """The value that JSON text spells.

    Raises:
      RepeatedKey: an object has a key twice.
      ValueError: NaN or Infinity, which JSON does not have; `json.JSONDecodeError` where the text is not JSON.
      RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of `json.loads` that raises RepeatedKey."""
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKey(f"two members are called {repeated!r}")
    return members


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")
