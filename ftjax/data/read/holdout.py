"""Which rows are held out for evaluation: a pure function of the prompt, so that no prompt is on both sides."""

import hashlib
import json
import unicodedata

from ftjax.data.images.load import name_of

_NOT_ASKING = ("system", "developer", "assistant")  # roles whose messages ask nothing


def held_out(fields: dict, share: float) -> bool:
    """Whether a row is among the `share` of all prompts that is held out.

    Rows with one prompt are on one side, whatever their answers, their source and their format. A row that is held out
    with a smaller share is held out with a larger one too.

    Args:
      fields: one of the five records that `formats.check_row` gives.
      share: from 0 (none) to 1 (all).
    """
    return prompt_hash(fields) < share * 2.0**64


def prompt_hash(fields: dict, salt: str = "") -> int:
    """64-bit hash of the prompt of a record; another salt gives an independent one."""
    text = prompt_key(fields) + salt
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def prompt_key(fields: dict) -> str:
    """The messages before the first answer, with case, white space and Unicode forms evened out, and their images'
    names.

    Before the first and not the last answer, because of two conversations that start alike the longer one holds the
    shorter. What an assistant says before anyone asked is part of the prompt; where nobody asks, the system prompt is
    the prompt. A text has none and is its own key, so that copies of it stay together.
    """
    if "text" in fields:
        return _even(fields["text"])
    messages = fields.get("messages", fields.get("prompt"))
    if isinstance(messages, str):  # the same key as a chat with one user turn, which another source may have
        messages = [{"role": "user", "content": messages}]
    parts, asked = [], not any(message["role"] not in _NOT_ASKING for message in messages)
    for message in messages:
        if message["role"] == "assistant" and parts and asked:
            break
        asked = asked or message["role"] not in _NOT_ASKING
        content = message.get("content") or ""
        parts.append(f"{message['role']}:{_even(content if isinstance(content, str) else json.dumps(content))}")
        parts += [name_of(image) for image in message.get("images", ())]
    return "\n".join(parts)


def _even(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
