"""What a row asks and what it answers, as plain text: that by which rows are compared, whatever their format."""

import json
from collections.abc import Sequence
from typing import NamedTuple


class Parts(NamedTuple):
    """
    Attributes:
      prompt: all that comes before the answer, roles included; "" for a row of text.
      answers: the answer; two for a preference, the chosen one first.
      verdicts: whether each answer is called good: (True, False) for a preference, the label of an unpaired row; ()
        where the answers are only there to be learnt.
    """

    prompt: str
    answers: tuple[str, ...]
    verdicts: tuple[bool, ...] = ()


def parts(fields: dict) -> Parts:
    """The parts of a checked row's fields (see `formats.check_row`)."""
    if "text" in fields:
        return Parts("", (fields["text"],))
    if "messages" in fields:
        messages = fields["messages"]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        return Parts(conversation(messages[:last]), (conversation(messages[last:]),))
    prompt = conversation(fields["prompt"])
    if "chosen" in fields:
        return Parts(prompt, (conversation(fields["chosen"]), conversation(fields["rejected"])), (True, False))
    verdicts = (bool(fields["label"]),) if "label" in fields else ()
    return Parts(prompt, (conversation(fields["completion"]),), verdicts)


def conversation(messages: str | Sequence[dict]) -> str:
    """Turns as "role: content" lines. A string is one user turn's, so that both spellings of a prompt are equal."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and not messages[0].get("tool_calls"):
        return content(messages[0])
    return "\n".join(f"{message['role']}: {content(message)}" for message in messages)


def content(message: dict) -> str:
    """What a message says, its tool calls as JSON after it."""
    text = message.get("content")
    text = text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False)
    calls = message.get("tool_calls")
    return text + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")


def own_text(fields: dict) -> str:
    """What the row itself says, without the system prompts that whole data sets share: for finding near duplicates."""
    if "text" in fields:
        return fields["text"]
    found = []
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        value = fields.get(name)
        if isinstance(value, str):
            found.append(value)
        elif value:
            found += [content(message) for message in value if message["role"] not in ("system", "developer")]
    return "\n".join(found)
