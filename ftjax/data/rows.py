"""Rows of training data: JSONL files are read here, `tfds:` sources in `tfds_source`; `formats` checks every row."""

import glob
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ftjax.data.example import Row
from ftjax.data.formats import check_row
from ftjax.errors import UserError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 2**20
_BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def read_rows(source: str, format: str | None = None, split: str = "train", max_bad_rows: int = 0) -> list[Row]:
    """Reads and checks all rows of a source.

    Args:
      source: the path or glob of .jsonl files (read in sorted order), or `tfds:...` (see `tfds_source`). `task:NAME`
        is the caller's to resolve, with `check_rows`.
      format: a key of `formats.FORMATS`; None detects it row by row from the fields.
      split: for `tfds:` sources, a split or a slice of one ("train[:1%]"); a file has no splits.
      max_bad_rows: how many bad rows may be skipped in the whole source. They are counted in a logged warning.

    Returns:
      At least one row; its `fields` are only those of its format.

    Raises:
      UserError: no file, an empty file, a bad row (with its file and line), an unknown format.
    """
    if source.startswith("tfds:"):
        from ftjax.data import tfds_source

        records = tfds_source.records(source, split)
    elif source.startswith(("task:", "hf:")):
        raise UserError(f"{source}: this kind of source cannot be read as rows; use a .jsonl file or tfds:NAME")
    else:
        if split != "train":
            raise UserError(f"{source}: a file has no split {split!r}; drop `split` or name another file")
        records = _jsonl_records(source)
    rows = _collect(records, format, max_bad_rows)
    if not rows:
        raise UserError(f"{source}: no rows (split {split!r}); name a source that has some")
    return rows


def check_rows(dicts: Iterable[dict], source: str, format: str | None = None) -> list[Row]:
    """Rows that a task gives as dicts; row 3 of source "task:tickets" has the origin "task:tickets[3]"."""
    return _collect(((f"{source}[{i}]", lambda d=d: d) for i, d in enumerate(dicts)), format, max_bad_rows=0)


def _collect(records: Iterable[tuple[str, Callable[[], dict]]], format: str | None, max_bad_rows: int) -> list[Row]:
    rows, bad = [], []
    for origin, parse in records:
        try:
            rows.append(check_row(parse(), origin, format))
        except UserError as error:
            bad.append(str(error))
            if max_bad_rows == 0:
                raise
            if len(bad) > max_bad_rows:
                raise UserError(
                    f"more than {max_bad_rows} bad rows; mend them or raise max_bad_rows. "
                    f"First: {bad[0]}; last: {bad[-1]}"
                ) from error
    if bad:
        log.warning(
            "skipped %d bad rows of %d (at most %d allowed); first: %s",
            len(bad),
            len(bad) + len(rows),
            max_bad_rows,
            bad[0],
        )
    return rows


def _jsonl_records(source: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    # A path that exists is itself, even where its name has brackets or stars.
    paths = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise UserError(f"{source}: no such file; check the path or glob (relative to {Path.cwd()})")
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{path}: is a directory; name the files, for example {path.rstrip('/')}/*.jsonl")
        if not path.endswith(".jsonl"):
            raise UserError(f"{path}: not a .jsonl file; write one JSON object per line to a file named *.jsonl")
    for path in paths:
        try:
            with open(path, "rb") as file:
                found = False
                for number, line in _lines(file, path):
                    found = True
                    origin = f"{path}:{number}"
                    yield origin, lambda line=line, origin=origin: _parse(line, origin)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
        if not found:
            raise UserError(f"{path}: the file has no rows; fill it or leave it out")


def _lines(file, path: str) -> Iterator[tuple[int, bytes | None]]:
    """Line numbers and the lines that are not blank; None for a line over the limit, which is never held whole."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1 and line.startswith(_BOMS):
            raise UserError(
                f"{path}:1: starts with a byte order mark; save the file as UTF-8 without BOM "
                f"(for UTF-8: sed -i '1s/^\\xEF\\xBB\\xBF//' {path})"
            )
        if len(line) > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(2**20)):
                pass
            yield number, None
        elif line.strip():
            yield number, line


def _parse(line: bytes | None, origin: str) -> dict:
    if line is None:
        raise UserError(f"{origin}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; split the row or remove it")
    try:
        fields = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{origin}: {what}; each line must be one whole JSON object") from None
    except ValueError as error:  # NaN, Infinity, an integer of thousands of digits
        raise UserError(f"{origin}: not plain JSON ({error}); write the value as a string or remove it") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply; flatten the row or remove it") from None
    if not isinstance(fields, dict):
        raise UserError(f'{origin}: a JSON {type(fields).__name__}, not an object; write the row as {{"field": ...}}')
    return fields


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")
