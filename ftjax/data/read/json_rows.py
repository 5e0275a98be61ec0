"""JSON files: a list of objects, an object that holds such a list, or JSON Lines under another name."""

import hashlib
import json
import re
from array import array
from typing import NoReturn

import numpy as np

from ftjax.data.read import files, spans
from ftjax.data.read.files import DataFile
from ftjax.data.read.jsonl import Jsonl
from ftjax.data.read.spans import Spans, parse_object
from ftjax.errors import UserError

MAX_FILE_BYTES = 2 * 2**30
_SPACE = re.compile(r"[ \t\r\n]*")
# Lists under these names are part of a row, not the list of rows.
_FIELDS = {"messages", "conversations", "history", "tools", "prompt", "completion", "chosen", "rejected"}
# Numbers are only passed over here; what they are is looked at when the row is read.
_DECODER = json.JSONDecoder(parse_int=len, parse_float=len)


class Json:
    """The objects of a list in a JSON file. `Records` of `rows`.

    Opening holds the text of the file (at most 2 GiB) for as long as it takes; then 16 bytes a row remain.
    """

    def __init__(self, file: DataFile, found: tuple[np.ndarray, np.ndarray, str]):
        self._spans = Spans(file, *found)

    def __len__(self) -> int:
        return len(self._spans)

    def origin(self, i: int) -> str:
        """file:line[i], since a line may hold several."""
        return f"{self._spans.place(i)}[{i}]"

    def __getitem__(self, i: int) -> dict:
        origin = self.origin(i)
        return parse_object(self._spans.text(i, origin).rstrip(" \t\r\n,"), origin)

    def digest(self) -> str:
        return self._spans.digest


def open_json(file: DataFile) -> Json | Jsonl:
    """The rows of a .json file.

    It is a list of them, or an object with the list under "data" or as the only list in it; or objects one after the
    other, which are read as JSON Lines.

    Raises:
      UserError: none of these, with the line; larger than 2 GiB.
    """
    if files.stamp(file.path)[0] > MAX_FILE_BYTES:
        raise UserError(
            f"{file.name}: larger than {MAX_FILE_BYTES >> 30} GiB, and JSON must be read whole; write JSON Lines, for "
            f"example with: jq -c '.[]' {file.name} > rows.jsonl"
        )
    raw = b"".join(spans.content(file))
    digest = hashlib.sha256(raw).hexdigest()
    text = raw.decode("latin-1")  # a byte a character: places in the text are places in the file
    del raw
    start = _skip(text, 0)
    try:
        if text.startswith("[", start):
            elements, end = _list(text, start)
            if (rest := _skip(text, end)) < len(text):
                _refuse(text, rest, "Extra data")
        elif text.startswith("{", start):
            lists, twice, end = _members(text, start)
            rows = {name: found for name, found in lists.items() if name not in _FIELDS}
            if _skip(text, end) < len(text) or lists.keys() & _FIELDS:
                return Jsonl(file)
            if twice is not None:
                raise UserError(f"{file.name}: two members are called {twice!r}; keep one of them")
            if "data" not in rows and len(rows) != 1:
                raise UserError(
                    f"{file.name}: an object with {'several lists' if rows else 'no list'} in it "
                    f"({', '.join(rows) or 'of rows'}); name the list of rows 'data', or write JSON Lines"
                )
            elements = rows["data"] if "data" in rows else next(iter(rows.values()))
        elif start == len(text):
            elements = array("q", [0])  # Spans says that it is empty
        else:
            _refuse(text, start, "Expecting a list or an object")
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        raise UserError(
            f"{file.name}:{line}: not JSON ({error.msg} at column {error.colno}); a .json file must be a list of "
            "objects, or an object with such a list"
        ) from None
    except RecursionError:
        raise UserError(f"{file.name}: nested too deeply; flatten its rows") from None
    starts = np.frombuffer(elements, np.int64)
    return Json(file, (starts, _line_numbers(text, starts[:-1]), digest))


def _list(text: str, start: int) -> tuple[array, int]:
    """Where the elements of the list at `start` begin and the last one ends, and where the list ends."""
    starts, at = array("q"), _skip(text, start + 1)
    if text.startswith("]", at):
        return array("q", [at]), at + 1
    while True:
        starts.append(at)
        _, end = _DECODER.raw_decode(text, at)
        at = _skip(text, end)
        if text.startswith("]", at):
            starts.append(end)
            return starts, at + 1
        at = _comma(text, at)


def _members(text: str, start: int) -> tuple[dict[str, array], str | None, int]:
    """The lists among the members of the object at `start`, as `_list` gives them, a name that two members have, and
    where the object ends."""
    lists, names, twice, at = {}, set(), None, _skip(text, start + 1)
    if text.startswith("}", at):
        return lists, twice, at + 1
    while True:
        if not text.startswith('"', at):
            _refuse(text, at, "Expecting property name enclosed in double quotes")
        name, at = _DECODER.raw_decode(text, at)
        twice = name if name in names else twice
        names.add(name)
        at = _skip(text, at)
        if not text.startswith(":", at):
            _refuse(text, at, "Expecting ':' delimiter")
        at = _skip(text, at + 1)
        if text.startswith("[", at):
            lists[name], at = _list(text, at)
        else:
            _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text.startswith("}", at):
            return lists, twice, at + 1
        at = _comma(text, at)


def _comma(text: str, at: int) -> int:
    if not text.startswith(",", at):
        _refuse(text, at, "Expecting ',' delimiter")
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _refuse(text: str, at: int, what: str) -> NoReturn:
    raise json.JSONDecodeError(what, text, at)


def _line_numbers(text: str, starts: np.ndarray) -> np.ndarray:
    """int64 [n]: the line, from 1, of each place in the text."""
    numbers, line, before = np.empty(len(starts), np.int64), 1, 0
    for i, start in enumerate(starts.tolist()):
        line += text.count("\n", before, start)
        numbers[i], before = line, start
    return numbers
