"""The entries of data.train and data.eval, opened: files, TFDS and Hugging Face data sets and tasks as one sequence."""

import bisect
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from ftjax.data.format.formats import FORMATS, check_row
from ftjax.data.read import files, splits
from ftjax.data.read.csv_rows import Csv
from ftjax.data.read.files import DataFile
from ftjax.data.read.json_rows import Json, open_json
from ftjax.data.read.jsonl import Jsonl
from ftjax.data.read.rows import Records, Rows, Source
from ftjax.data.read.tables import Parquet
from ftjax.errors import UserError
from ftjax.tasks import registry

log = logging.getLogger(__name__)

TASK = "task:"
KINDS: dict[str, Callable[[DataFile], Records]] = {
    "jsonl": Jsonl,
    "json": open_json,
    "csv": Csv,
    "tsv": Csv,
    "parquet": Parquet,
}


def read_sources(
    entries: Iterable[dict], max_bad_rows: int = 0, holdout: float = 0.0, heldout_side: bool = False
) -> Rows:
    """The rows of all entries, in their order; `rows` says how to pass over them.

    Args:
      entries: {"source", "format"?, "split"?, "weight"?, "limit"?}; see docs/data.md.
      max_bad_rows: how many bad rows of each entry may be skipped.
      holdout: the share of the rows that is held out (`holdout.held_out`).
      heldout_side: take the rows that are held out, instead of the others.

    Raises:
      UserError: nothing is there, or it cannot be opened; an unknown format, task or split. What is wrong with a single
        row shows when it is asked for.
    """
    opened = [_open(entry) for entry in entries]
    if not heldout_side:  # else said already, of the training side
        _tell_twice(opened)
    return Rows(opened, max_bad_rows, holdout, heldout_side)


def _tell_twice(opened: Sequence[Source]) -> None:
    """Warns of entries that are the same files, or copies of them, by digests that opening has made."""
    names = {}
    for source in opened:
        if isinstance(source.records, Csv | Json | Jsonl | Parquet | Joined):
            names.setdefault(source.digest(), []).append(source.name)
    for same in names.values():
        if len(same) > 1:
            log.warning(
                "%s hold the same rows, which count twice; leave one out, or set its weight", " and ".join(same)
            )


def _open(entry: dict) -> Source:
    source, format = entry["source"], entry.get("format")
    if format is not None and format not in FORMATS:
        check_row({}, source, format)  # which says so: now, not once for every row
    split = splits.parse(entry.get("split", "train"), source)
    records = _records(source, split.name)
    chosen = splits.choose(len(records), split, entry.get("limit"), source)
    name = f"{source} {entry['split']}" if "split" in entry else source
    return Source(name, records, chosen, format, float(entry.get("weight", 1.0)))


def _records(source: str, split: str) -> Records:
    """All records of one split of a source."""
    if source.startswith(TASK):
        task = registry.get(source.removeprefix(TASK))
        return Given(registry.examples(task, split), source)
    if source.startswith("tfds:"):
        from ftjax.data.read import tfds_source

        return tfds_source.open_split(source, split)
    if source.startswith("hf:") and not source.startswith("hf://"):  # that is a URL of files
        from ftjax.data.read import hf_source

        return hf_source.open_split(source, split)
    if split != "train":
        raise UserError(
            f"{source}: a file has no split {split!r}; name another file, or a slice of this one: 'train[:90%]'"
        )
    parts = [KINDS[file.kind](file) for file in files.find(source)]
    return parts[0] if len(parts) == 1 else Joined(parts)


class Given:
    """Rows that are there already, as dicts; row 3 of "task:tickets" has the origin "task:tickets[3]". `Records`."""

    def __init__(self, dicts: Sequence[dict], source: str):
        self._dicts, self._source = dicts, source
        if not dicts:
            raise UserError(f"{source}: no rows; name a source that has some")

    def __len__(self) -> int:
        return len(self._dicts)

    def origin(self, i: int) -> str:
        return f"{self._source}[{i}]"

    def __getitem__(self, i: int) -> dict:
        return self._dicts[i]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._dicts, sort_keys=True).encode()).hexdigest()


class Joined:
    """The files of a glob, one after the other. `Records`."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, i: int) -> tuple[Records, int]:
        at = bisect.bisect_right(self._ends, i)
        return self._parts[at], i - (self._ends[at] - len(self._parts[at]))

    def origin(self, i: int) -> str:
        part, i = self._find(i)
        return part.origin(i)

    def __getitem__(self, i: int) -> dict:
        part, i = self._find(i)
        return part[i]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([part.digest() for part in self._parts]).encode()).hexdigest()
