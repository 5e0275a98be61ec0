"""Conversations -> text through the tokenizer's own chat template, and what of the tokenizer decides its tokens."""

import datetime
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from ftjax.errors import UserError

if TYPE_CHECKING:  # importing transformers takes a second, and only annotations need it here
    from transformers import PreTrainedTokenizerFast

# What a template written for other messages, or badly, ends with.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ZeroDivisionError)

TODAY = datetime.date(2026, 1, 1)  # what templates are told that ask for the date
# A template's own macro hides the function of this name that tells today's date, however it is called. What comes after
# keeps its white space, which a block would trim.
_CODES = [f"%{flag}{code}" for flag in ("", "-") for code in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYZ"]
_PINNED = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Traits:
    """What is asked of a tokenizer for every row, found once.

    Attributes:
      ends: tokens that can end a turn: eos and every special token but BOS, padding and unknown.
      borders: special tokens that are found in the text before anything else happens to it, so that the tokens after
        one depend on nothing before it, and those before it on nothing after it.
    """

    ends: frozenset[int]
    borders: frozenset[int]


def traits(tokenizer: "PreTrainedTokenizerFast") -> Traits:
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return _traits(tokenizer, len(tokenizer), named)


@functools.lru_cache(maxsize=8)
def _traits(tokenizer, _size: int, named: tuple[int | None, ...]) -> Traits:
    bos, eos, pad, unk = named
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    ends = (special | set(tokenizer.all_special_ids)) - {bos, pad, unk}
    if eos is not None:  # may double as the padding or BOS token
        ends.add(eos)
    borders = {i for i in special if not added[i].normalized and not added[i].single_word}
    return Traits(frozenset(ends), frozenset(borders))


def template_of(tokenizer: "PreTrainedTokenizerFast", origin: str, tools: list[dict] | None = None) -> str:
    """The template that a conversation is rendered with: a tokenizer may have another one for tools.

    Where it writes today's date it writes TODAY: the tokens of a row do not depend on the day that they are made.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{origin}: the tokenizer has no chat template to render messages with; take an "
            "instruction-tuned model, add chat_template to its tokenizer_config.json, or use rows of "
            "text or of prompt/completion strings"
        )
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error
    return _PINNED + template if "strftime_now" in template else template


def render(
    messages: list[dict],
    tokenizer: "PreTrainedTokenizerFast",
    origin: str,
    tools: list[dict] | None = None,
    generation_prompt: bool = False,
) -> str:
    """The text of a conversation; with the generation prompt, what a model is given to go on from."""
    given = for_template(messages, tokenizer, origin, tools)
    try:
        return tokenizer.apply_chat_template(
            given,
            tools=tools,
            chat_template=template_of(tokenizer, origin, tools),
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except TEMPLATE_ERRORS as error:
        raise template_refuses(origin, error) from error


def for_template(messages: list[dict], tokenizer, origin: str, tools: list[dict] | None = None) -> list[dict]:
    """Messages as this template takes them, without the keys that are ours.

    `developer` is OpenAI's later name for `system`; a template that does not know it gets `system`. Arguments of tool
    calls are dicts, but JSON text where the template writes them with no `tojson`.
    """
    template = template_of(tokenizer, origin, tools)
    as_text = any("tool_calls" in message for message in messages) and _wants_text(tokenizer, template)
    given = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight" and value is not None}
        if message["role"] == "developer" and "developer" not in template:
            message["role"] = "system"
        if as_text and "tool_calls" in message:
            message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        given.append(message)
    return given


def template_refuses(origin: str, error: Exception) -> UserError:
    return UserError(
        f"{origin}: the chat template refuses the conversation: {error}; change the order of its roles, or leave out "
        "what the template does not know"
    )


@functools.lru_cache(maxsize=8)
def _wants_text(tokenizer, template: str) -> bool:
    """Whether a template takes the arguments of a call as JSON text: with a dict, it fails or writes Python's repr."""
    call = {"id": "call00000", "type": "function", "function": {"name": "zebra", "arguments": {"stripe": "a"}}}
    probe = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "zebra", "content": "b", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "Hello"},
    ]
    tools = [{"type": "function", "function": {"name": "zebra", "description": "", "parameters": {}}}]

    def text(messages):
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except TEMPLATE_ERRORS:
            return ""

    probes = [probe, [*probe[:1], {**probe[1], "tool_calls": [_with_text(call)]}, *probe[2:]]]
    with_dict, with_text = map(text, probes)
    if with_dict and "{'stripe': 'a'}" not in with_dict:
        return False
    return '{"stripe": "a"}' in with_text


def _with_text(call: dict) -> dict:
    function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
    return {**call, "function": function}
