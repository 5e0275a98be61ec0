"""JSON files: a list of objects, an object that holds such a list, or JSON Lines under another name."""

import hashlib
import json
import re
import shlex
from array import array
from typing import NoReturn

import numpy as np

from ftjax.data.read import files, json_values
from ftjax.data.read.files import DataFile
from ftjax.data.read.json_values import DECODER, parse_element
from ftjax.data.read.jsonl import open_jsonl
from ftjax.data.read.spans import Index, TextRows
from ftjax.errors import UserError

MAX_FILE_BYTES = 2 * 2**30
_SPACE = re.compile(r"[ \t\r\n]*")
# Lists under these names are part of a row, not the list of rows.
_FIELDS = {"messages", "conversations", "history", "tools", "prompt", "completion", "chosen", "rejected"}


def open_json(file: DataFile) -> TextRows:
    """The rows of a .json file.

    It is a list of them, or an object with the list under "data" or as the only list in it; or objects one after the
    other, which are read as those of a .jsonl file. Opening an object holds its text (at most 2 GiB) while it lasts;
    then 16 bytes a row remain.

    Raises:
      UserError: none of these, with the line; an object larger than 2 GiB.
    """
    if json_values.first_character(file) == "[":
        return json_values.open_values(file, listed=True)
    if files.stamp(file.path)[0] > MAX_FILE_BYTES:
        raise UserError(
            f"{file.name}: larger than {MAX_FILE_BYTES >> 30} GiB, and an object must be read whole; write its list "
            f"alone, or JSON Lines, for example with: jq -c '.data[]' {shlex.quote(file.name)} > rows.jsonl"
        )
    raw = b"".join(files.content(file))
    digest = hashlib.sha256(raw).hexdigest()
    text = raw.decode("latin-1")  # a character for each byte, so offsets in the text are offsets in the file
    del raw
    try:
        offsets = _row_offsets(text, file.name)
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise UserError(
            f"{file.name}:{line}: not JSON ({error.msg} at column {error.colno}); a .json file must be a list of "
            "objects, or an object with such a list"
        ) from None
    except RecursionError:
        raise UserError(f"{file.name}: nested too deeply; flatten its rows") from None
    if offsets is None:
        return open_jsonl(file)
    starts = np.frombuffer(offsets, np.int64)
    index = Index(starts, _line_numbers(text, starts[:-1]), digest)
    return TextRows(file, index, parse_element, shared_lines=True)


def _row_offsets(text: str, name: str) -> array | None:
    """The offsets of the rows and of the end of the last one; None where the file is to be read as JSON Lines."""
    start = _skip_space(text, 0)
    if start == len(text):
        return array("q", [0])  # no row, which TextRows refuses
    if not text.startswith("{", start):
        _refuse(text, start, "Expecting a list or an object")
    lists, repeated, end = _lists_of_object(text, start)
    if _skip_space(text, end) < len(text) or lists.keys() & _FIELDS:  # more than one object, or one that is a row
        return None
    if repeated is not None:
        raise UserError(f"{name}: two members are called {repeated!r}; keep one of them")
    if "data" not in lists and len(lists) != 1:
        raise UserError(
            f"{name}: an object with {'several lists' if lists else 'no list'} in it "
            f"({', '.join(lists) or 'of rows'}); name the list of rows 'data', or write JSON Lines"
        )
    return lists["data"] if "data" in lists else next(iter(lists.values()))


def _list(text: str, start: int) -> tuple[array, int]:
    """The offsets of the elements of the list at `start` and of the end of the last one; where the list ends."""
    offsets, position = array("q"), _skip_space(text, start + 1)
    if text.startswith("]", position):
        return array("q", [position]), position + 1
    while True:
        offsets.append(position)
        _, end = DECODER.raw_decode(text, position)
        position = _skip_space(text, end)
        if text.startswith("]", position):
            offsets.append(end)
            return offsets, position + 1
        position = _skip_comma(text, position)


def _lists_of_object(text: str, start: int) -> tuple[dict[str, array], str | None, int]:
    """The lists among the members of the object at `start`, each as `_list` gives it; a name that two members have;
    where the object ends."""
    lists, names, repeated, position = {}, set(), None, _skip_space(text, start + 1)
    if text.startswith("}", position):
        return lists, repeated, position + 1
    while True:
        if not text.startswith('"', position):
            _refuse(text, position, "Expecting property name enclosed in double quotes")
        name, position = DECODER.raw_decode(text, position)
        repeated = name if name in names else repeated
        names.add(name)
        position = _skip_space(text, position)
        if not text.startswith(":", position):
            _refuse(text, position, "Expecting ':' delimiter")
        position = _skip_space(text, position + 1)
        if text.startswith("[", position):
            lists[name], position = _list(text, position)
        else:
            _, position = DECODER.raw_decode(text, position)
        position = _skip_space(text, position)
        if text.startswith("}", position):
            return lists, repeated, position + 1
        position = _skip_comma(text, position)


def _skip_comma(text: str, position: int) -> int:
    if not text.startswith(",", position):
        _refuse(text, position, "Expecting ',' delimiter")
    return _skip_space(text, position + 1)


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _refuse(text: str, position: int, message: str) -> NoReturn:
    raise json.JSONDecodeError(message, text, position)


def _line_numbers(text: str, offsets: np.ndarray) -> np.ndarray:
    """int64 [n]: the line, from 1, of each of the rising offsets."""
    lines, line, previous = np.empty(len(offsets), np.int64), 1, 0
    for i, offset in enumerate(offsets.tolist()):
        line += text.count("\n", previous, offset)
        lines[i], previous = line, offset
    return lines
