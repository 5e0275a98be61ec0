"""Format-independent prompt and answer text of rows, for deduplication and leak checks."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ftjax.data.format.conversation import REASONING
from ftjax.data.format.images import images_of
from ftjax.data.images.load import identity


class Parts(NamedTuple):
    """The texts of a row.

    Attributes:
      prompt: all that comes before the answer, roles and tools included; "" for a row of text.
      answers: the answer; two for a preference, the chosen one first; none of a question that is only scored.
      verdicts: whether each answer is called good: (True, False) for a preference, the label of an unpaired row; ()
        where the answers are only there to be learned.
      muted: which of the assistant's turns have weight 0, as "2,4"; "" where all are learned. Of an answer in steps
        which are right, as "++-".
    """

    prompt: str
    answers: tuple[str, ...]
    verdicts: tuple[bool, ...] = ()
    muted: str = ""

    def texts(self) -> tuple[str, ...]:
        """All parts as strings. Rows for which they are equal are the same to training."""
        return (self.prompt, *self.answers, *map(str, self.verdicts), self.muted)


def parts(fields: dict) -> Parts:
    """The parts of a checked row's fields (see `formats.check_row`)."""
    if isinstance(fields.get("label"), str):  # a class is what is learned of all the rest
        whole = parts({name: value for name, value in fields.items() if name != "label"})
        return Parts("\n".join((whole.prompt, *whole.answers)), (fields["label"],))
    if "text" in fields:
        return Parts("", (fields["text"],))
    if "messages" in fields:
        messages = fields["messages"]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = answers[-1] if answers else len(messages)
        muted = ",".join([str(k) for k, i in enumerate(answers, 1) if messages[i].get("weight") == 0])
        prompt = conversation(messages[:last]) + _tools(fields)
        return Parts(prompt, (conversation(messages[last:]),), muted=muted)
    prompt = conversation(fields["prompt"]) + _tools(fields)
    if "chosen" in fields:
        return Parts(prompt, (conversation(fields["chosen"]), conversation(fields["rejected"])), (True, False))
    if "completions" in fields:  # good if every step is right; which are is what tells copies apart
        labels = "".join("+" if label else "-" for label in fields["labels"])
        return Parts(prompt, ("\n".join(fields["completions"]),), (all(fields["labels"]),), labels)
    if "completion" not in fields:
        return Parts(prompt, ())
    verdicts = (bool(fields["label"]),) if "label" in fields else ()
    return Parts(prompt, (conversation(fields["completion"]),), verdicts)


def conversation(messages: str | Sequence[dict]) -> str:
    """Turns as "role: content" lines. One turn without a role, so that a prompt is equal as a string and as a turn."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and (text := content(messages[0])) == messages[0].get("content"):
        return text
    return "\n".join([f"{message['role']}: {content(message)}" for message in messages])


def content(message: dict) -> str:
    """The text of a message, after its thoughts and before its tool calls as JSON; last a word for each image."""
    text = message.get("content")
    if len(message) == 2 and isinstance(text, str):  # nothing but role and content, the usual message
        return text
    text = text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False)
    calls = message.get("tool_calls")
    thought = next((message[key] for key in REASONING if message.get(key)), None)
    text = f"{thought}\n{text}" if isinstance(thought, str) else text
    text += json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else ""
    return " ".join([text, *map(_word, message.get("images", ()))])


def _tools(fields: dict) -> str:
    tools = fields.get("tools")
    return f"\ntools: {json.dumps(tools, ensure_ascii=False, sort_keys=True)}" if tools else ""


def own_text(fields: dict) -> str:
    """The text of a row without its system prompts, which whole data sets share: for finding near duplicates."""
    if "text" in fields:
        return fields["text"]
    names = ("messages", "prompt", "completion", "chosen", "rejected")
    return _joined(fields, names, lambda turn: turn["role"] not in ("system", "developer"))


def near_text(fields: dict) -> str:
    """What `duplicates.signature` is made of: `own_text`, and where a row has images letters that depend on them, so
    many that rows with the same text and other images are not alike."""
    text, images = own_text(fields), images_of(fields)
    if not images:
        return text
    names = "\n".join(map(identity, images)).encode()
    return f"{text}\n{hashlib.shake_256(names).hexdigest(len(text.encode()) // 6 + 8)}"


def _word(image: str) -> str:
    """A word of letters that stands for an image: no digits, which could look private."""
    digest = hashlib.blake2b(identity(image).encode(), digest_size=8).hexdigest()
    return "image-" + digest.translate(str.maketrans("0123456789abcdef", "abcdefghijklmnop"))


def trained_text(fields: dict) -> str:
    """The text of a row's answers, turns of weight 0 left out; "" for a row of text, which may be rendered already."""
    names = ("messages", "completion", "chosen", "rejected")
    return _joined(fields, names, lambda turn: turn["role"] == "assistant" and turn.get("weight") != 0)


def _joined(fields: dict, names: Sequence[str], keeps: Callable[[dict], bool]) -> str:
    """The strings under the named fields and the contents of the turns that are kept, on lines of their own."""
    texts = []
    for name in names:
        value = fields.get(name)
        if isinstance(value, str):
            texts.append(value)
        elif value:
            texts += [content(turn) for turn in value if keeps(turn)]
    return "\n".join(texts)
