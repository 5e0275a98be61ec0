"""CSV and TSV files with a header. The index is made by parsing once; a row is parsed again when it is asked for."""

import csv
import functools
import hashlib
import itertools
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np

from ftjax import strict_json
from ftjax.data.read import columns, files, spans
from ftjax.data.read.columns import NONE, Columns
from ftjax.data.read.files import DataFile
from ftjax.data.read.spans import Index, TextRows
from ftjax.errors import UserError

log = logging.getLogger(__name__)

DELIMITERS = ",;\t|"
_HEADER_LINES = 1000  # that the header, with line ends in its quotes, may take
# Columns that formats want as lists, and those where a list of messages may stand instead of a string.
_LISTS = {"messages", "conversations", "history", "tools", "completions", "labels", "answers", "images"}
_MESSAGES = {"prompt", "completion", "chosen", "rejected"}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def open_csv(file: DataFile, names: Columns = NONE) -> TextRows:
    """The records of a CSV or TSV file as dicts of strings, by the names in its first record.

    Cells that formats want as something else are converted: lists of messages, tools, answers, steps and their labels
    from JSON, `label` beside a completion from true/false/1/0, `margin` and `probability` from a number; empty ones in
    these columns are absent, and an empty `label` is None. The separator is the one of DELIMITERS that gives the header
    the most columns. A column without a name is left out: the first one, where pandas writes its index, and others if
    their cells are empty. Holds 16 bytes a row.
    """
    csv.field_size_limit(spans.MAX_ROW_BYTES)  # of the whole process, and by default too little for a document
    options = {"delimiter": _delimiter(file), "strict": True}
    header, index = _index(file, options)
    if header and not header[0]:
        _say_unnamed(file.name)
    columns.check(names, header, file.name)
    return TextRows(file, index, partial(_parse_record, header, dict(names), options))


@functools.cache
def _say_unnamed(name: str) -> None:
    log.warning("%s: the first column has no name and is left out, as an index that pandas wrote", name)


def _delimiter(file: DataFile) -> str:
    """The separator of the cells: among those that give the header the most columns the usual one of its kind."""
    usual = "\t" if file.kind == "tsv" else ","
    columns = {}
    for delimiter in sorted(DELIMITERS, key=lambda delimiter: delimiter != usual):
        with closing(_byte_lines(file, lambda block: None)) as lines:
            text = (line.decode("latin-1") for line in lines)
            records = csv.reader(itertools.islice(text, _HEADER_LINES), delimiter=delimiter, strict=True)
            try:
                columns[delimiter] = next((len(cells) for cells in records if cells), 0)
            except csv.Error:  # such as a letter after a quote, where another separator stands
                columns[delimiter] = 0
    return max(columns, key=columns.get)


def _parse_record(header: Sequence[str], names: Columns, options: Mapping, text: str, origin: str) -> dict:
    csv.field_size_limit(spans.MAX_ROW_BYTES)
    cells = next(csv.reader((line + "\n" for line in text.split("\n")), **options))
    if len(cells) != len(header):
        listed = ", ".join(name or "without a name" for name in header)
        raise UserError(
            f"{origin}: has {len(cells)} cells, and the header {len(header)} ({listed}); quote cells that hold "
            f"separators ({options['delimiter']!r})"
        )
    if extra := next((i for i, cell in enumerate(cells) if i and cell.strip() and not header[i]), 0):
        raise UserError(
            f"{origin}: cell {extra + 1} stands in a column without a name; name it in the first line, or quote cells "
            f"that hold separators ({options['delimiter']!r})"
        )
    given = columns.renamed({name: cell for name, cell in zip(header, cells, strict=True) if name}, names)
    # Beside a completion a label calls it good or bad. Elsewhere it is a class, which may be called "true" or "0".
    fields = {
        name: (cell or None) if name == "label" and "completion" not in given else _value(name, cell, origin)
        for name, cell in given.items()
    }
    return {name: value for name, value in fields.items() if value is not None or name == "label"}


def _value(name: str, cell: str, origin: str) -> object:
    if name in _LISTS | _MESSAGES and cell.startswith(("[", "{")):
        try:
            value = json.loads(cell, object_pairs_hook=strict_json.unique)
        except strict_json.RepeatedKey as error:
            raise UserError(f"{origin}: {error}; keep one of them") from None
        except (ValueError, RecursionError):
            return cell  # text that starts with a bracket; what must be a list is refused by the checks of its format
        return value if name in _LISTS or _is_messages(value) else cell
    if name in _LISTS:
        return cell or None
    if name == "label":
        return _TRUTH.get(cell.strip().lower(), cell or None)
    if name in ("margin", "probability"):
        try:
            return float(cell) if cell else None
        except ValueError:
            raise UserError(f"{origin}: {name} is {cell!r}, not a number; correct the cell") from None
    return cell


def _is_messages(value: object) -> bool:
    """Whether JSON in a cell is a message or a list of them, and not an answer that happens to be JSON."""
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in messages
    )


def _index(file: DataFile, options: dict) -> tuple[list[str], Index]:
    """The names of the columns, and the index of the records."""
    digest, starts, line_numbers = hashlib.sha256(), array("q"), array("q")
    offset = count = 0  # bytes and lines that csv.reader, which does not say how far it has read, has taken

    def lines() -> Iterator[str]:
        nonlocal offset, count
        for line in _byte_lines(file, digest.update):
            offset += len(line)
            count += 1
            # Latin-1 gives each byte its character, and has separators, quotes and line ends where UTF-8 has them. What
            # is not UTF-8 shows when the row is read.
            yield line.decode("latin-1")

    header, start, line = None, 0, 1  # start, line: of the record that is read next
    try:
        for cells in csv.reader(lines(), **options):
            if header is None and len(cells) == 2 and (cells[0].lower(), cells[1]) == ("sep=", ""):
                pass  # a line by which Excel knows the separator
            elif header is None and cells:
                header = _names(cells, file.name, line)
            elif cells:
                starts.append(start)
                line_numbers.append(line)
            start, line = offset, count + 1
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{file.name}:{line}: a line ends in a carriage return alone; save the file with the line ends of Unix "
                "or Windows, or quote the cell"
            ) from None
        raise UserError(
            f"{file.name}:{line}: not well-formed CSV in the record that starts here ({error}); quote cells with "
            'separators, quotes or line ends in them, and write quotes in them twice ("")'
        ) from None
    starts.append(start)
    index = Index(np.frombuffer(starts, np.int64), np.frombuffer(line_numbers, np.int64), digest.hexdigest())
    return header or [], index


def _byte_lines(file: DataFile, update: Callable[[bytes], None]) -> Iterator[bytes]:
    """The lines of a file with their ends. `update` gets every block."""
    tail, count = b"", 0
    with closing(files.content(file)) as blocks:
        for block in blocks:
            update(block)
            *lines, tail = (tail + block).split(b"\n")
            count += len(lines)
            yield from (line + b"\n" for line in lines)
            if len(tail) > spans.MAX_ROW_BYTES:
                raise spans.too_long(f"{file.name}:{count + 1}")
    if tail:
        yield tail


def _names(cells: list[str], file: str, line: int) -> list[str]:
    """The names of the columns, read as Latin-1; "" for one without a name."""
    raw = [cell.encode("latin-1") for cell in cells]
    try:
        header = [cell.decode().strip() for cell in raw]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise spans.not_utf8(f"{file}:{line}: the header is not UTF-8", byte, file) from None
    named = [name for name in header if name]
    if not named:
        raise UserError(f"{file}:{line}: no column has a name; name them in the first line, as prompt,completion")
    if repeated := next((name for name in named if named.count(name) > 1), None):
        raise UserError(f"{file}:{line}: two columns are called {repeated!r}; the first line must name each once")
    return header
