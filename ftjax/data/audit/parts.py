"""What a row asks and what it answers, as plain text: that by which rows are compared, whatever their format."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from ftjax.data.format.conversation import REASONING


class Parts(NamedTuple):
    """
    Attributes:
      prompt: all that comes before the answer, roles and tools included; "" for a row of text.
      answers: the answer; two for a preference, the chosen one first.
      verdicts: whether each answer is called good: (True, False) for a preference, the label of an unpaired row; ()
        where the answers are only there to be learned.
      muted: which of the assistant's turns have weight 0, as "2,4"; "" where all are learned.
    """

    prompt: str
    answers: tuple[str, ...]
    verdicts: tuple[bool, ...] = ()
    muted: str = ""

    def texts(self) -> tuple[str, ...]:
        """All of it: rows with the same ones are the same to training."""
        return (self.prompt, *self.answers, *map(str, self.verdicts), self.muted)


def parts(fields: dict) -> Parts:
    """The parts of a checked row's fields (see `formats.check_row`)."""
    if "text" in fields:
        return Parts("", (fields["text"],))
    if "messages" in fields:
        messages = fields["messages"]
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = said[-1] if said else len(messages)
        muted = ",".join([str(k) for k, i in enumerate(said, 1) if messages[i].get("weight") == 0])
        prompt = conversation(messages[:last]) + _tools(fields)
        return Parts(prompt, (conversation(messages[last:]),), muted=muted)
    prompt = conversation(fields["prompt"]) + _tools(fields)
    if "chosen" in fields:
        return Parts(prompt, (conversation(fields["chosen"]), conversation(fields["rejected"])), (True, False))
    verdicts = (bool(fields["label"]),) if "label" in fields else ()
    return Parts(prompt, (conversation(fields["completion"]),), verdicts)


def conversation(messages: str | Sequence[dict]) -> str:
    """Turns as "role: content" lines. A string is one user turn's, so that both spellings of a prompt are equal."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and (said := content(messages[0])) == messages[0].get("content"):
        return said
    return "\n".join([f"{message['role']}: {content(message)}" for message in messages])


def content(message: dict) -> str:
    """What a message says, its thoughts before and its tool calls as JSON after it."""
    text = message.get("content")
    if len(message) == 2 and isinstance(text, str):  # role and content, as most are
        return text
    text = text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False)
    calls = message.get("tool_calls")
    thought = next((message[key] for key in REASONING if message.get(key)), None)
    text = f"{thought}\n{text}" if isinstance(thought, str) else text
    return text + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")


def _tools(fields: dict) -> str:
    tools = fields.get("tools")
    return f"\ntools: {json.dumps(tools, ensure_ascii=False, sort_keys=True)}" if tools else ""


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


def trained_text(fields: dict) -> str:
    """What the answers of a row say, turns of weight 0 left out; "" for a text, which may be rendered already."""
    found = []
    for name in ("messages", "completion", "chosen", "rejected"):
        value = fields.get(name)
        if isinstance(value, str):
            found.append(value)
        elif value:
            found += [content(one) for one in value if one["role"] == "assistant" and one.get("weight") != 0]
    return "\n".join(found)
