"""Answers that are JSON, or JSON of a schema: which tokens may come next, by llguidance's grammars."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from ftjax.hosted.generation import Generation
from ftjax.hosted.refusals import Refused
from ftjax.sampling.request import Allows

# Between the parts of a value: without an end to it, a model may write nothing else.
SPACE = r"[ \n\t]{0,16}"
PARAM = "response_format"


def follows(generation: Generation, asked: dict[str, Any]) -> Callable[[], Allows] | None:
    """What makes a Request's `allows` for a response_format; None for one of text.

    Raises:
      Refused: it is none of OpenAI's, or of a schema that cannot be followed.
    """
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        schema = asked["json_schema"].get("schema") if isinstance(asked.get("json_schema"), dict) else None
        if not isinstance(schema, dict):
            raise Refused('response_format has no schema; give {"json_schema": {"name", "schema"}}.', param=PARAM)
    else:
        raise Refused(f"response_format is of type {kind!r}; use 'text', 'json_object' or 'json_schema'.", param=PARAM)
    limits = llguidance.LLParserLimits(verbose_errors=False)
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": SPACE}
        )
        wrong = llguidance.LLMatcher.validate_grammar(grammar, generation.vocabulary, limits=limits)
    except (ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise Refused(f"response_format: the schema cannot be followed: {wrong}", param=PARAM)
    return lambda: _Follows(llguidance.LLMatcher(generation.vocabulary, grammar, limits=limits), generation)


class _Follows:
    """An Allows; for one row, since it knows how far that is."""

    def __init__(self, matcher: llguidance.LLMatcher, generation: Generation):
        self._matcher, self._read = matcher, 0
        spec = generation.base.model.spec
        self._words = -(-spec.vocab_size // 32)
        self._mask = llguidance.numpy.allocate_token_bitmask(1, generation.vocabulary.vocab_size)
        self._ends = np.zeros(self._words, np.int32)
        for token in generation.base.end_tokens:
            self._ends[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        self._matcher.consume_tokens(tokens[self._read :])
        self._read = len(tokens)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        allowed = self._mask[0, : self._words]
        # What exceeds the grammar's limits ends there.
        return allowed if allowed.any() and not self._matcher.is_error() else self._ends
