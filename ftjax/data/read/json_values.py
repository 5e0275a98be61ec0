"""The rows of JSON text that does not have one on each line: one list of all, or values one after the other.

They are found in one pass over the file, which holds the value that is being read and a block of the file.
"""

import hashlib
import json
import re
from array import array
from contextlib import closing

import numpy as np

from ftjax.data.read import files, spans
from ftjax.data.read.files import DataFile
from ftjax.data.read.spans import Index, TextRows, parse_object
from ftjax.errors import UserError

_LONGEST_WORD = 16  # that may be cut in two: -Infinity, or \uD83D\uDE42
_SPACE = re.compile(r"[ \t\r\n]*")
# The index only needs to know where values end; their numbers are parsed when the row is read.
DECODER = json.JSONDecoder(parse_int=len, parse_float=len)


def open_values(file: DataFile, listed: bool) -> TextRows:
    """The rows of a file that is one JSON list of them, where `listed`; else of values one after the other.

    Holds 16 bytes a row.

    Raises:
      UserError: the text is neither, with the line.
    """
    digest = hashlib.sha256()
    with closing(files.content(file)) as blocks:
        text = _Window(file.name, blocks, digest.update)
        starts, lines = _listed(text) if listed else _joined(text)
        text.rest()
    index = Index(np.frombuffer(starts, np.int64), np.frombuffer(lines, np.int64), digest.hexdigest())
    shared = listed or bool((np.diff(index.lines) == 0).any())
    return TextRows(file, index, parse_element, shared_lines=shared)


def parse_element(text: str, origin: str) -> dict:
    """The JSON object at the start of a span that ends where the next value starts."""
    return parse_object(text.rstrip(" \t\r\n,"), origin)


def first_character(file: DataFile) -> str:
    """The first character of a text that is not white space; "" where there is none."""
    with closing(files.content(file)) as blocks:
        return _Window(file.name, blocks).peek()


def layout(file: DataFile) -> str:
    """How the rows of a file of JSON stand in it: "lines" (one on each), "list" or "values" (one after the other).

    What cannot be read at all counts as lines, each of which is refused when it is read.
    """
    with closing(files.content(file)) as blocks:
        text = _Window(file.name, blocks)
        first = text.peek()
        if first == "[":
            return "list"
        if first != "{":
            return "lines"
        _, line = text.place()
        try:
            text.skip_value()
        except UserError:
            return "lines"
        _, end = text.place()
        goes_on = text.peek() in ("{", ",") and text.place()[1] == line
        return "values" if end > line or goes_on else "lines"


class _Window:
    """The part of a text that is looked at, a character for each byte (Latin-1), so that offsets are those of the file.

    Attributes:
      text: what has been read and not been forgotten.
      at: the position in it that comes next.
    """

    def __init__(self, name: str, blocks, update=lambda block: None):
        self.text, self.at = "", 0
        self._name, self._blocks, self._update = name, blocks, update
        self._start, self._line, self._counted = 0, 1, 0  # of the text: its offset, and the line at position _counted

    def grow(self) -> bool:
        """Reads one more block and forgets what comes before `at`; False at the end of the file."""
        block = next(self._blocks, None)
        if block is None:
            return False
        self._update(block)
        self._start, _ = self.place()
        self.text, self.at, self._counted = self.text[self.at :] + block.decode("latin-1"), 0, 0
        return True

    def rest(self) -> None:
        """Reads all that is left and forgets it."""
        self.at = len(self.text)
        while self.grow():
            self.at = len(self.text)

    def place(self, at: int | None = None) -> tuple[int, int]:
        """The byte offset of position `at`, or of what comes next, and its line."""
        at = self.at if at is None else at
        self._line += self.text.count("\n", self._counted, at)
        self._counted = at
        return self._start + at, self._line

    def peek(self) -> str:
        """The next character that is not white space, to which it moves; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def skip_value(self) -> None:
        """Moves to the end of the value that starts here."""
        while True:
            error, end = None, len(self.text)
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as caught:
                error = caught
            except RecursionError:
                raise UserError(f"{self._name}:{self.place()[1]}: nested too deeply; flatten its rows") from None
            if end < len(self.text):
                self.at = end
                return
            # It may go on in the next block, unless the error is not where the text ends for now. The error of an open
            # string is at its start.
            if error and error.pos + _LONGEST_WORD < end and not error.msg.startswith("Unterminated"):
                raise self.refusal(error.msg, error.pos)
            if len(self.text) - self.at > spans.MAX_ROW_BYTES:
                raise spans.too_long(f"{self._name}:{self.place()[1]}")
            if not self.grow():
                if error:
                    raise self.refusal(error.msg, error.pos)
                self.at = end
                return

    def refusal(self, message: str, at: int | None = None) -> UserError:
        """The error about the position `at`, or about what comes next."""
        _, begun = self.place()
        at = self.at if at is None else at
        line = self.place(max(at, self._counted))[1]
        column = at - self.text.rfind("\n", 0, at)
        in_row = f", in the row that begins on line {begun}" if line > begun else ""
        return UserError(
            f"{self._name}:{line}: not JSON ({message} at column {column}{in_row}); write one object on each line, or "
            "one list of objects"
        )


def _listed(text: _Window) -> tuple[array, array]:
    """The offsets of the elements of the list at the start and of the end of the last one; their lines."""
    starts, lines = array("q"), array("q")
    text.peek()
    text.at += 1
    if text.peek() == "]":
        starts.append(text.place()[0])
    else:
        while True:
            offset, line = text.place()
            starts.append(offset)
            lines.append(line)
            text.skip_value()
            end = text.place()[0]
            if (char := text.peek()) != ",":
                if char != "]":
                    raise text.refusal("Expecting ',' delimiter")
                starts.append(end)
                break
            text.at += 1
            text.peek()
    text.at += 1
    if text.peek():
        raise text.refusal("Extra data")
    return starts, lines


def _joined(text: _Window) -> tuple[array, array]:
    """The offsets of values one after the other and of the end of the last one; their lines. There may be commas."""
    starts, lines = array("q"), array("q")
    while text.peek():
        offset, line = text.place()
        starts.append(offset)
        lines.append(line)
        text.skip_value()
        if text.peek() == ",":
            text.at += 1
    starts.append(text.place()[0])
    return starts, lines
