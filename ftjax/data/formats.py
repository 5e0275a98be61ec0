"""The formats of rows: which fields each has, how it is detected, and the checks of its contents.

A format is one entry of `FORMATS`: its fields and the function that checks them.
"""

import difflib
from collections.abc import Callable

from ftjax.data.example import Row
from ftjax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def check_row(fields: dict, origin: str, format: str | None = None) -> Row:
    """Detects the format (unless it is named), checks the fields and keeps those of the format.

    Raises:
      UserError: with the origin, what is wrong and what to do.
    """
    if format is None:
        fitting = [name for name, (keys, _) in FORMATS.items() if _has(fields, keys)]
        if len(fitting) > 1:
            raise UserError(f"{origin}: fits the formats {' and '.join(fitting)}; set `format` to the one you mean")
    else:
        if format not in FORMATS:
            near = difflib.get_close_matches(format, FORMATS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"data format {format!r} is unknown; known: {', '.join(FORMATS)}{hint}")
        fitting = [format] if _has(fields, FORMATS[format][0]) else []
    if not fitting:
        known = "; ".join(f"{name} ({', '.join(keys)})" for name, (keys, _) in FORMATS.items())
        wanted = f"the format {format!r}" if format else "no known format"
        verb = "does not fit" if format else "fits"
        raise UserError(
            f"{origin}: {verb} {wanted}: it has the fields {sorted(map(str, fields))}, and the formats are "
            f"{known}; rename its fields"
        )
    keys, check = FORMATS[fitting[0]]
    check(fields, origin)
    return Row({key: fields[key] for key in keys}, origin)


def check_messages(messages: object, origin: str, needs_assistant: bool = True) -> None:
    """A non-empty list of {role, content}, with at least one assistant turn, none empty, and none of them first."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{origin}: messages must be a non-empty list of {{role, content}} objects")
    for i, message in enumerate(messages):
        where = f"{origin}: message {i}"
        if not isinstance(message, dict):
            raise UserError(f"{where} is a {type(message).__name__}; write it as {{role, content}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise UserError(f"{where} has tool_calls, which cannot be trained on yet; write the call into content")
        _check_string(content, f"{where} ({role}): content")
        if message.get("weight") not in (None, 0, 1):
            raise UserError(f"{where} has the weight {message['weight']!r}; use 0 (no loss) or 1")
        if role == "assistant" and not content.strip():
            raise UserError(f"{where} is an empty assistant turn; remove it or write the answer")
    roles = [message["role"] for message in messages]
    if needs_assistant and "assistant" not in roles:
        raise UserError(f"{origin}: no assistant turn, so nothing to train on; add one or remove the row")
    if needs_assistant and roles[0] == "assistant":
        raise UserError(f"{origin}: the conversation starts with an assistant turn; put a user turn before it")


def _check_chat(fields: dict, origin: str) -> None:
    if fields.get("tools"):
        raise UserError(f"{origin}: `tools` cannot be trained on yet; remove the field or describe them in a message")
    check_messages(fields["messages"], origin)


def _check_prompt_completion(fields: dict, origin: str) -> None:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        check_messages(prompt, f"{origin}: prompt", needs_assistant=False)
        check_messages(completion, f"{origin}: completion", needs_assistant=False)
        check_messages(prompt + completion, origin)
        if completion[0]["role"] != "assistant":
            raise UserError(
                f"{origin}: the completion starts with a {completion[0]['role']} turn; the prompt must hold it"
            )
        return
    for key in ("prompt", "completion"):
        _check_string(fields[key], f"{origin}: {key}")
        if not fields[key].strip():
            raise UserError(f"{origin}: {key} is empty; fill it in, or use `text` rows for text without a prompt")


def _check_text(fields: dict, origin: str) -> None:
    _check_string(fields["text"], f"{origin}: text")
    if not fields["text"].strip():
        raise UserError(f"{origin}: text is empty; fill it in or remove the row")


# name -> the fields it needs, the check of their contents.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], None]]] = {
    "messages": (("messages",), _check_chat),
    "prompt_completion": (("prompt", "completion"), _check_prompt_completion),
    "text": (("text",), _check_text),
}


def _has(fields: dict, keys: tuple[str, ...]) -> bool:
    return all(fields.get(key) is not None for key in keys)


def _check_string(value: object, what: str) -> None:
    if isinstance(value, bytes):
        raise UserError(f"{what} is bytes that are not UTF-8 text; convert the data set")
    if not isinstance(value, str):
        raise UserError(f"{what} is a {type(value).__name__}, not a string; write it as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"{what} has a lone surrogate (\\ud8xx) at character {error.start}; remove it") from None
