"""Rows that are spans of a text file: an index says where each is, and it is read and parsed when it is asked for."""

import json
import shlex
from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from ftjax import strict_json
from ftjax.data.read import files
from ftjax.data.read.files import DataFile
from ftjax.errors import UserError

MAX_ROW_BYTES = 64 * 2**20


class Index(NamedTuple):
    """Where the rows of a text file are: 8 bytes a row, and 8 more where rows and lines are not the same.

    Attributes:
      starts: int64 [n + 1], byte offsets; row i ends where row i + 1 starts, separators included.
      lines: int64 [n], the line on which each row starts, from 1; None where row i is line i + 1.
      digest: sha256 (hex) of the whole file.
    """

    starts: np.ndarray
    lines: np.ndarray | None
    digest: str


class TextRows:
    """The rows of a text file. `Records` of `rows`.

    Args:
      file: to read them from.
      index: of the rows.
      parse: makes the fields of a row from its text and its origin; UserError where it is malformed.
      shared_lines: several rows may be on one line, so the origin of row 3 is "a.json:1[3]" and not "a.jsonl:4".
    """

    def __init__(
        self, file: DataFile, index: Index, parse: Callable[[str, str], dict], shared_lines: bool = False
    ) -> None:
        if len(index.starts) < 2:
            raise UserError(f"{file.name}: the file has no rows; fill it or leave it out")
        self._name, self._path, self._stamp = file.name, file.path, files.stamp(file.path)
        self._index, self._parse, self._shared_lines = index, parse, shared_lines

    def __len__(self) -> int:
        return len(self._index.starts) - 1

    def origin(self, i: int) -> str:
        line = i + 1 if self._index.lines is None else self._index.lines[i]
        return f"{self._name}:{line}[{i}]" if self._shared_lines else f"{self._name}:{line}"

    def folder(self, i: int) -> str:
        return files.folder(self._name)

    def __getitem__(self, i: int) -> dict:
        origin = self.origin(i)
        start, stop = int(self._index.starts[i]), int(self._index.starts[i + 1])
        if stop - start > MAX_ROW_BYTES:
            raise too_long(origin)
        raw = files.read_part(self._path, self._stamp, start, stop)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            what = f"{origin}: not UTF-8 at byte {error.start} of the row"
            raise not_utf8(what, raw[error.start], self._name) from None
        return self._parse(text, origin)

    def digest(self) -> str:
        return self._index.digest


def too_long(origin: str) -> UserError:
    return UserError(f"{origin}: the line is longer than {MAX_ROW_BYTES >> 20} MiB; split the row or remove it")


def not_utf8(what: str, byte: int, name: str) -> UserError:
    """The error that says `what`, with how to save the file `name` as UTF-8; byte: the first that is wrong."""
    character = bytes([byte]).decode("cp1252", "replace")
    return UserError(
        f"{what} (0x{byte:02X}, which is {character!r} in Windows-1252); save the file as UTF-8, "
        f"in Excel as 'CSV UTF-8', or convert it: iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(name)} > utf8"
        f"{PurePath(name).suffix}"
    )


def parse_object(text: str, origin: str) -> dict:
    """The JSON object that a row is; UserError for anything else."""
    try:
        fields = strict_json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{origin}: {what}; each line must be one whole JSON object") from None
    except strict_json.RepeatedKey as error:
        raise UserError(f"{origin}: {error}; keep one of them") from None
    except ValueError as error:  # NaN, Infinity, an integer of thousands of digits
        raise UserError(f"{origin}: not plain JSON ({error}); write the value as a string or remove it") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply; flatten the row or remove it") from None
    if not isinstance(fields, dict):
        raise UserError(f'{origin}: a JSON {type(fields).__name__}, not an object; write the row as {{"field": ...}}')
    return fields
