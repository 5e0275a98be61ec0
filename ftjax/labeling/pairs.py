"""Pairs of answers to one prompt, which a person compares."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import NamedTuple

from ftjax.data.audit import parts
from ftjax.labeling.candidates import Candidates


class Pair(NamedTuple):
    """Two answers to a prompt, "a" and "b"; which of them stands left is drawn when they are shown.

    Attributes:
      id: hex digest of the contents, by which labels name the pair.
      prompt, a, b: messages, as `data.format.conversation` makes them.
      tools: schemas, or ().
    """

    id: str
    prompt: list[dict]
    a: list[dict]
    b: list[dict]
    tools: list[dict] | tuple = ()

    @property
    def texts(self) -> tuple[str, str, str]:
        """The prompt and both answers as text."""
        return tuple(parts.conversation(turns) for turns in (self.prompt, self.a, self.b))


def pairs_of(candidates: Iterable[Candidates]) -> list[Pair]:
    """Every two answers of each prompt, once."""
    found = {}
    for prompt, answers, tools, _ in candidates:
        for a, b in itertools.combinations(answers, 2):
            contents = json.dumps([prompt, tools, a, b], sort_keys=True).encode()
            digest = hashlib.sha256(contents).hexdigest()[:16]
            found[digest] = Pair(digest, prompt, a, b, tools)
    return list(found.values())
