"""Rows that are pieces of a text file: read one by one from where an index says they are."""

import codecs
import json
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from ftjax import strict_json
from ftjax.data.read import files
from ftjax.data.read.files import DataFile
from ftjax.errors import UserError

MAX_ROW_BYTES = 64 * 2**20
_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Spans:
    """Where the rows of a text file are: 8 bytes a row, and 8 more where rows and lines are not the same.

    Attributes:
      name: of the file, for messages.
      starts: int64 [n + 1], bytes; row i ends where the next begins, with what is between them.
      lines: int64 [n], the line on which each begins, from 1; None where row i is line i + 1.
      digest: hex, of the whole file.
    """

    def __init__(self, file: DataFile, starts: np.ndarray, lines: np.ndarray | None, digest: str):
        self.name, self.starts, self.lines, self.digest = file.name, starts, lines, digest
        self._path, self._stamp = file.path, files.stamp(file.path)
        if not len(self):
            raise UserError(f"{file.name}: the file has no rows; fill it or leave it out")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def place(self, i: int) -> str:
        """file:line"""
        return f"{self.name}:{i + 1 if self.lines is None else self.lines[i]}"

    def text(self, i: int, origin: str) -> str:
        """What is there; UserError where it is not UTF-8, or too long, which is then not held."""
        start, stop = int(self.starts[i]), int(self.starts[i + 1])
        if stop - start > MAX_ROW_BYTES:
            raise too_long(origin)
        try:
            return files.read_part(self._path, self._stamp, start, stop).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{origin}: not UTF-8 at byte {error.start} of the row; convert the file to UTF-8"
            ) from None


def too_long(origin: str) -> UserError:
    return UserError(f"{origin}: the line is longer than {MAX_ROW_BYTES >> 20} MiB; split the row or remove it")


def content(file: DataFile) -> Iterator[bytes]:
    """The blocks of a text file; UserError where it cannot be read or starts with a byte order mark."""
    with files.opened(file) as stream, closing(files.blocks(stream, file.name)) as blocks:
        for number, block in enumerate(blocks):
            if number == 0 and block.startswith(_BOMS):
                raise UserError(
                    f"{file.name}:1: starts with a byte order mark; save the file as UTF-8 without BOM "
                    f"(for UTF-8: sed -i '1s/^\\xEF\\xBB\\xBF//' {file.name})"
                )
            yield block


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
