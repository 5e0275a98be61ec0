"""The entries of data.train and data.eval, opened as one sequence: files, TFDS and Hugging Face data sets, tasks."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ftjax.data.format.formats import FIELDS, FORMATS, check_row
from ftjax.data.read import columns, files, splits
from ftjax.data.read.columns import NONE, Columns
from ftjax.data.read.csv_rows import open_csv
from ftjax.data.read.json_rows import open_json
from ftjax.data.read.jsonl import open_jsonl
from ftjax.data.read.rows import Numbered, Records, Rows, Source, locate
from ftjax.data.read.spans import TextRows
from ftjax.data.read.tables import Parquet
from ftjax.errors import SourceError, UserError, did_you_mean
from ftjax.tasks import registry

log = logging.getLogger(__name__)

TASK = "task:"
_PEEKED = 100  # rows among whose fields named columns are looked for, where there is no header
# kind of file (see `files.FILE_KINDS`) -> what opens its rows
OPENERS = {"jsonl": open_jsonl, "json": open_json}
HEADED = {"csv": open_csv, "tsv": open_csv, "parquet": Parquet}  # these look for the columns in the file's header


def read_sources(
    entries: Iterable[dict], max_bad_rows: int = 0, holdout: float = 0.0, heldout_side: bool = False
) -> Rows:
    """The rows of all entries, in their order.

    Args:
      entries: {"source", "format"?, "split"?, "weight"?, "replay"?, "limit"?, "columns"?, "score"?}; see
        docs/data.md.
      max_bad_rows: how many bad rows of each entry may be skipped.
      holdout: the share of the rows that is held out (`holdout.held_out`).
      heldout_side: give the rows that are held out, instead of the others.

    Raises:
      UserError: a source is missing, empty or cannot be opened; an unknown format, task or split. A bad row is only
        found when it is read.
    """
    opened = [_open(entry) for entry in entries]
    if not heldout_side:  # the training side of these entries has warned already
        _warn_duplicate_sources(opened)
    return Rows(opened, max_bad_rows, holdout, heldout_side)


def absolute(source: str) -> str:
    """The source with the path in it made absolute, if it is of local files: the same from every working directory."""
    before, path, after = _local_part(source)
    if not path:
        return source
    expanded = Path(path if os.path.exists(path) else os.path.expanduser(path))
    if expanded.is_absolute():
        return f"{before}{expanded}{after}"
    # A name that is no file is a pattern, of which the working directory is no part.
    here = str(Path.cwd()) if os.path.exists(path) else glob.escape(str(Path.cwd()))
    return f"{before}{here}/{expanded}{after}"


def is_here(source: str) -> bool:
    """Whether a source is of local files, and they are there."""
    _, path, _ = _local_part(source)
    return bool(path) and (os.path.exists(path) or bool(glob.glob(os.path.expanduser(path), recursive=True)))


def _local_part(source: str) -> tuple[str, str, str]:
    """(before, path, after) of a source; path is "" if it names no local files (of a data set: none that are there)."""
    if source.startswith(TASK) or "://" in source:
        return source, "", ""
    if source.startswith("hf:"):
        return ("hf:", rest, "") if os.path.isdir(rest := source.removeprefix("hf:")) else (source, "", "")
    if source.startswith("tfds:"):
        name, _, directory = source.removeprefix("tfds:").partition(":")
        if directory:
            return f"tfds:{name}:", directory, ""
        return ("tfds:", name, "") if os.path.isdir(name) else (source, "", "")
    return "", source, ""


def _warn_duplicate_sources(opened: Sequence[Source]) -> None:
    """Warns of entries that are the same files or copies of them. Only of files, whose digests opening has made."""
    names_by_digest = {}
    for source in opened:
        if isinstance(source.records, TextRows | Parquet | Joined | Renamed):
            names_by_digest.setdefault(source.digest(), []).append(source.name)
    for names in names_by_digest.values():
        if len(names) > 1:
            log.warning(
                "%s hold the same rows, which count twice; leave one out, or set its weight", " and ".join(names)
            )


def _open(entry: dict) -> Source:
    source, format = entry["source"], entry.get("format")
    if format is not None and format not in FORMATS:
        check_row({}, source, format)  # raises now, not once for every row
    split = splits.parse_split(entry.get("split", "train"), source)
    names = entry.get("columns", NONE)
    if unknown := next((ours for ours in names if ours not in FIELDS), None):
        raise UserError(
            f"{source}: the option columns = {names} names {unknown!r}, which no format has (the names are ours first, "
            f"then the source's){did_you_mean(unknown, FIELDS)}"
        )
    records = _records(source, split.name, names)
    chosen = splits.select(len(records), split, entry.get("limit"), source)
    name = f"{source} {entry['split']}" if "split" in entry else source
    weight, replay = float(entry.get("weight", 1.0)), entry.get("replay", 0.0)
    return Source(name, records, chosen, format, weight, names, replay, "score" in entry)


def _records(source: str, split: str, names: Columns) -> Records:
    """All records of one split of a source."""
    if source.startswith(TASK):
        task = registry.get(source.removeprefix(TASK))
        return _by_our_names(Given(registry.examples(task, split), source), names, source)
    if source.startswith("tfds:"):
        from ftjax.data.read import tfds_source

        return tfds_source.Tfds(source, split, names)
    if source.startswith("hf:") and not source.startswith("hf://"):  # hf:// is a URL of files
        from ftjax.data.read import hf_source

        return hf_source.HuggingFace(source, split, names)
    if split != "train":
        raise UserError(
            f"{source}: a file has no split {split!r}; name another file, or a slice of this one: 'train[:90%]'"
        )
    parts = []
    for file in files.resolve(source):
        if file.kind in HEADED:
            parts.append(HEADED[file.kind](file, names))
        else:
            parts.append(_by_our_names(OPENERS[file.kind](file), names, file.name))
    return parts[0] if len(parts) == 1 else Joined(parts)


class Given(Numbered):
    """Rows in memory, as dicts. `Records`."""

    def __init__(self, dicts: Sequence[dict], source: str):
        super().__init__(source, len(dicts))
        self._dicts = dicts
        if not dicts:
            raise UserError(f"{source}: no rows; name a source that has some")

    def __getitem__(self, i: int) -> dict:
        return self._dicts[i]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._dicts, sort_keys=True).encode()).hexdigest()


class Joined:
    """The files of a glob, one after the other. `Records`."""

    def __init__(self, parts: Sequence[Records]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def origin(self, i: int) -> str:
        number, i = locate(self._ends, i)
        return self._parts[number].origin(i)

    def folder(self, i: int) -> str:
        number, i = locate(self._ends, i)
        return self._parts[number].folder(i)

    def __getitem__(self, i: int) -> dict:
        number, i = locate(self._ends, i)
        return self._parts[number][i]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([part.digest() for part in self._parts]).encode()).hexdigest()


class Renamed:
    """Records of JSON by our names of their columns. `Records`."""

    def __init__(self, records: Records, names: Columns):
        self._records, self._names = records, names

    def __len__(self) -> int:
        return len(self._records)

    def origin(self, i: int) -> str:
        return self._records.origin(i)

    def folder(self, i: int) -> str:
        return self._records.folder(i)

    def __getitem__(self, i: int) -> dict:
        return columns.renamed(self._records[i], self._names)

    def digest(self) -> str:
        return self._records.digest()


def _by_our_names(records: Records, names: Columns, where: str) -> Records:
    """The records with their columns renamed; UserError where none of the first has a column that is named."""
    if not names:
        return records
    seen = {}  # in the order in which they are met
    for i in range(min(len(records), _PEEKED)):
        try:
            seen |= dict.fromkeys(records[i])
        except SourceError:
            raise
        except UserError:  # a bad row, which is reported when it is its turn
            continue
    if seen:
        columns.check(names, seen, where)
    return Renamed(records, names)
