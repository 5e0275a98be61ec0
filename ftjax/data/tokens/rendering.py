"""Conversations -> text through the tokenizer's own chat template, and the special tokens that structure that text."""

import datetime
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2

from ftjax.data.format import images
from ftjax.data.format.conversation import with_json_arguments
from ftjax.data.images.rules import Shown
from ftjax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# By name: importing transformers takes a second, and only annotations need it here.
Tokenizer: TypeAlias = "PreTrainedTokenizerFast"
Messages = list[dict]  # a conversation as `conversation.conversation` returns it
Tools = list[dict] | None  # JSON schemas of the functions that the model may call

# What a template raises that is written for other messages, or badly.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ZeroDivisionError)

TODAY = datetime.date(2026, 1, 1)  # the date that templates get when they ask for it
# A macro in the template hides the function of the same name that gives today's date, however the template calls it.
# The empty string after it keeps the white space at the start of the template, which a block would trim.
_CODES = [f"%{flag}{code}" for flag in ("", "-") for code in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYZ"]
_PINNED = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Traits:
    """The special tokens that matter for every row, collected once for a tokenizer."""

    # Tokens that can end a turn: eos and every special token but BOS, padding and unknown.
    ends: frozenset[int]
    # Special tokens at which text is split before anything else happens to it: the tokens after one depend on nothing
    # before it, and those before it on nothing after it.
    borders: frozenset[int]


def traits(tokenizer: Tokenizer) -> Traits:
    # A tokenizer can be changed, so all that the result depends on is part of the key.
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return _traits(tokenizer, len(tokenizer), named)


@functools.lru_cache(maxsize=8)
def _traits(tokenizer: Tokenizer, _size: int, named: tuple[int | None, ...]) -> Traits:
    bos, eos, pad, unk = named
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    ends = (special | set(tokenizer.all_special_ids)) - {bos, pad, unk}
    if eos is not None:  # may double as the padding or BOS token
        ends.add(eos)
    borders = {i for i in special if not added[i].normalized and not added[i].single_word}
    return Traits(frozenset(ends), frozenset(borders))


def template_of(tokenizer: Tokenizer, origin: str, tools: Tools = None) -> str:
    """The source of the template for a conversation; a tokenizer may have a separate one for tools.

    Instead of today's date it writes TODAY, so that the tokens of a row do not depend on the day.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{origin}: the tokenizer has no chat template to render messages with; set config.data.chat_template to "
            "a known one (alpaca, chatml, gemma, llama3, mistral, zephyr) or to a file, take an instruction-tuned "
            "model, or use rows of text or of prompt/completion strings"
        )
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from error
    return _PINNED + template if "strftime_now" in template else template


def render(
    messages: Messages, tokenizer: Tokenizer, origin: str, tools: Tools = None, generation_prompt: bool = False
) -> str:
    """The text of a conversation; with the generation prompt, it is what a model is given to answer.

    Each image is what its `Shown` says instead of what the template writes.
    """
    text = apply_template(messages, tokenizer, origin, tools, tokenize=False, add_generation_prompt=generation_prompt)
    shown = [image for message in messages for image in message.get("images", ())]
    return _with_images(text, shown, origin) if shown else text


def _with_images(text: str, shown: list[Shown], origin: str) -> str:
    """The text of a template with the images in it, which it has left a placeholder for."""
    if not all(isinstance(image, Shown) for image in shown):
        raise UserError(
            f"{origin}: has images, which this run does not see; set config.model.vision=true for a model that takes "
            "images, or remove the row"
        )
    placeholder = shown[0].written
    pieces = text.split(placeholder)
    if len(pieces) - 1 != len(shown):
        raise UserError(
            f"{origin}: the chat template writes {placeholder} {len(pieces) - 1} times for {len(shown)} images; remove "
            "it from the text of the row, take the template that belongs to the model, or leave images to user turns"
        )
    return pieces[0] + "".join(image.text + piece for image, piece in zip(shown, pieces[1:]))


def apply_template(messages: Messages, tokenizer: Tokenizer, origin: str, tools: Tools, **options: Any) -> Any:
    """`tokenizer.apply_chat_template` with these options; UserError where the template refuses the conversation."""
    template = template_of(tokenizer, origin, tools)
    accepted = _for_template(messages, tokenizer, template)
    try:
        return tokenizer.apply_chat_template(accepted, tools=tools, chat_template=template, **options)
    except TEMPLATE_ERRORS as error:
        raise UserError(
            f"{origin}: the chat template refuses the conversation: {error}; change the order of its roles, or leave "
            "out what the template does not know"
        ) from error


def _for_template(messages: Messages, tokenizer: Tokenizer, template: str) -> Messages:
    """Messages as this template takes them, without the keys that are ours.

    `developer` is OpenAI's later name for `system`; a template that does not know it gets `system`. Arguments of tool
    calls are dicts, or JSON text where the template writes them without `tojson`.
    """
    as_text = any("tool_calls" in message for message in messages) and _wants_text(tokenizer, template)
    accepted = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight" and value is not None}
        if its := message.pop("images", None):
            message["content"] = [
                {"type": "image"} if part["type"] == "image" else part
                for part in images.as_parts(message["content"], its)
            ]
        if message["role"] == "developer" and "developer" not in template:
            message["role"] = "system"
        accepted.append(with_json_arguments(message) if as_text else message)
    return accepted


@functools.lru_cache(maxsize=8)
def _wants_text(tokenizer: Tokenizer, template: str) -> bool:
    """Whether a template takes the arguments of a call as JSON text: given a dict, it fails or writes Python's repr."""
    call = {"id": "call00000", "type": "function", "function": {"name": "zebra", "arguments": {"stripe": "a"}}}
    probe = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "zebra", "content": "b", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "Hello"},
    ]
    tools = [{"type": "function", "function": {"name": "zebra", "description": "", "parameters": {}}}]

    def text(messages: Messages) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
        except TEMPLATE_ERRORS:
            return ""

    with_dict = text(probe)
    if with_dict and "{'stripe': 'a'}" not in with_dict:
        return False
    return '{"stripe": "a"}' in text([with_json_arguments(message) for message in probe])
