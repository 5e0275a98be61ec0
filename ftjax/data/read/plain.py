"""The values that data set libraries give -> the values that JSON has."""

import numpy as np

from ftjax.data.read.columns import NONE, Columns, renamed

# Fields with lists of messages; OpenAI's preference format has one inside its field `input`.
_MESSAGES = {"messages", "conversations", "prompt", "completion", "chosen", "rejected"}
_MESSAGES |= {"preferred_output", "non_preferred_output"}


def plain_row(row: dict, columns: Columns = NONE) -> dict:
    """A row by our names, with its values as `plain` gives them, without those that are None. `label` stays: an empty
    one may be a mistake, which the checks of the formats report."""
    filled = {key: value for key, value in renamed(row, columns).items() if value is not None or key == "label"}
    return {key: plain(value, key in _MESSAGES, key == "input") for key, value in filled.items()}


def plain(value: object, messages: bool = False, holds_messages: bool = False):
    """Strings, numbers, lists and dicts, without the members that are None; lists of messages as lists of objects.

    A table gives every message all fields that any message has, with None for those that it lacks.

    Args:
      messages: the value may be a list of messages stored as one object of lists. Elsewhere such objects stay what they
        are: the arguments of a tool call may look like one.
      holds_messages: the same of its members.
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
        members = {
            key: plain(item, holds_messages and key in _MESSAGES) for key, item in value.items() if item is not None
        }
        # TFDS, and Hugging Face's feature `Sequence`, store a list of messages as one object of lists; turn it back.
        if messages and (_is_columns(members, "role") or _is_columns(members, "from")):
            return [plain(dict(zip(members, items, strict=True))) for items in zip(*members.values(), strict=True)]
        return members
    return value


def _is_columns(value: dict, name: str) -> bool:
    """Whether an object consists of lists of one length, one of them called `name`."""
    lengths = {len(item) if isinstance(item, list) else None for item in value.values()}
    return name in value and len(lengths) == 1 and None not in lengths
