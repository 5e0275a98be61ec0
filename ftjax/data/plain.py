"""Values as data set libraries give them -> the values that JSON has."""

import numpy as np


def plain_row(row: dict) -> dict:
    """A row with its values as `plain` gives them, without those that are None."""
    return {key: plain(value) for key, value in row.items() if value is not None}


def plain(value: object):
    """Strings, numbers, lists and dicts, without the members that are None, and lists of messages as such.

    A table gives every message all fields that any message has, with None for what was not there.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # perhaps an image in a field that is not used; bytes are refused where a string is wanted
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        found = {key: plain(item) for key, item in value.items() if item is not None}
        # TFDS, and Hugging Face where it was told so, store a list of messages as one object of lists; turn it back.
        if _is_turned(found, "role") or _is_turned(found, "from"):
            return [plain(dict(zip(found, items, strict=True))) for items in zip(*found.values(), strict=True)]
        return found
    return value


def _is_turned(value: dict, name: str) -> bool:
    lengths = {len(item) if isinstance(item, list) else None for item in value.values()}
    return name in value and len(lengths) == 1 and None not in lengths
