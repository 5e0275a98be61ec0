"""Values as data set libraries give them -> the values that JSON has."""

import numpy as np

# Fields with lists of messages, which may stand in `input` too.
_MESSAGES = {"messages", "conversations", "prompt", "completion", "chosen", "rejected"}
_MESSAGES |= {"preferred_output", "non_preferred_output"}


def plain_row(row: dict) -> dict:
    """A row with its values as `plain` gives them, without those that are None but for `label`, which may be missing
    by mistake."""
    named = {key: value for key, value in row.items() if value is not None or key == "label"}
    return {key: plain(value, key in _MESSAGES, key == "input") for key, value in named.items()}


def plain(value: object, messages: bool = False, holds_messages: bool = False):
    """Strings, numbers, lists and dicts, without the members that are None, and lists of messages as such.

    A table gives every message all fields that any message has, with None for what was not there.

    Args:
      messages: the value may be a list of messages. Elsewhere objects stay what they are: the arguments of a call may
        look like one.
      holds_messages: its members may be.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # perhaps an image in a field that is not used; bytes are refused where a string is wanted
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), messages, holds_messages)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        found = {
            key: plain(item, holds_messages and key in _MESSAGES) for key, item in value.items() if item is not None
        }
        # TFDS, and Hugging Face where it was told so, store a list of messages as one object of lists; turn it back.
        if messages and (_is_turned(found, "role") or _is_turned(found, "from")):
            return [plain(dict(zip(found, items, strict=True))) for items in zip(*found.values(), strict=True)]
        return found
    return value


def _is_turned(value: dict, name: str) -> bool:
    lengths = {len(item) if isinstance(item, list) else None for item in value.values()}
    return name in value and len(lengths) == 1 and None not in lengths
