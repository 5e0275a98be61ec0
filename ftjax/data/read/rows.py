"""The rows of all sources of a run as one sequence: read, parsed and checked when they are asked for.

Opening only makes an index of the rows; a bad row is found when it is parsed. So a pass over all rows looks like
`Rows.__iter__`; tokenization makes the same one in any number of processes, to which `Rows` can be pickled.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from ftjax.data.format import images
from ftjax.data.format.example import Row
from ftjax.data.format.formats import check_row
from ftjax.data.format.prompt import check_question
from ftjax.data.read.columns import Columns
from ftjax.data.read.holdout import held_out
from ftjax.errors import SourceError, UserError

log = logging.getLogger(__name__)


class Records(Protocol):
    """The rows of a file or data set as they are stored there: random access, from any thread, and picklable."""

    def __len__(self) -> int: ...

    def origin(self, i: int) -> str:
        """Where record i is, for messages: "file.jsonl:12"."""

    def __getitem__(self, i: int) -> dict:
        """The fields of record i as plain values; UserError that starts with its origin where it is damaged."""

    def folder(self, i: int) -> str:
        """The directory of the file that record i is in, from which its paths start; "" where it is in none here."""

    def digest(self) -> str:
        """Hex digest of the contents, which does not depend on path, compression or time."""


class Numbered:
    """What `Records` without lines have in common: record 3 of "hf:name" has the origin "hf:name[3]"."""

    def __init__(self, name: str, length: int, folder: str = ""):
        self._name, self._length, self._folder = name, length, folder

    def __len__(self) -> int:
        return self._length

    def origin(self, i: int) -> str:
        return f"{self._name}[{i}]"

    def folder(self, i: int) -> str:
        return self._folder


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Which of several sequences, joined, holds item i, and the item's index there. ends: int [n], where each ends."""
    number = int(np.searchsorted(ends, i, side="right"))
    return number, i - (int(ends[number - 1]) if number else 0)


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval, opened.

    Attributes:
      name: the entry's `source`, and its `split` where it has one.
      records: all of the file or data set.
      chosen: indices of the records that `split` and `limit` leave, rising: a range, or int64 [n].
      format: a key of `formats.FORMATS`, or None to detect it row by row.
      weight: how many times an epoch has each row (0.5: every second row).
      replay: where it is not 0 instead the share of an epoch's trained tokens that are of this source.
      columns: under which names `records` finds our columns.
      scored: its completions are scored, so that a row may do without an answer.
    """

    name: str
    records: Records
    chosen: Sequence[int] | np.ndarray
    format: str | None = None
    weight: float = 1.0
    columns: Columns = field(default_factory=dict)
    replay: float = 0.0
    scored: bool = False

    def __len__(self) -> int:
        return len(self.chosen)

    def origin(self, i: int) -> str:
        return self.records.origin(int(self.chosen[i]))

    def folder(self, i: int) -> str:
        return self.records.folder(int(self.chosen[i]))

    def raw(self, i: int) -> dict:
        return self.records[int(self.chosen[i])]

    def row(self, i: int) -> Row:
        check = check_question if self.scored else check_row
        row = check(self.raw(i), self.origin(i), self.format)
        if not images.images_of(row.fields):
            return row
        return Row(images.placed(row.fields, self.folder(i), row.origin), row.origin)

    def digest(self) -> str:
        columns = [sorted(self.columns.items())] if self.columns else []
        digest = hashlib.sha256(json.dumps([self.records.digest(), self.format, *columns]).encode())
        if isinstance(self.chosen, range):
            digest.update(repr(self.chosen).encode())
        else:
            digest.update(self.chosen.astype("<i8").data)
        return digest.hexdigest()


class Rows(Sequence[Row]):
    """Rows of several sources, one after the other.

    `len` and `[i]` count every candidate: bad rows and those of the other side of the hold-out have an index too. Only
    iteration leaves them out.

    Attributes:
      sources: as opened, in the order of the entries.
      max_bad_rows: how many bad rows of each source may be skipped.
      holdout, heldout_side: which rows `check` keeps: those for which `held_out(fields, holdout)` is heldout_side.
    """

    def __init__(
        self, sources: Sequence[Source], max_bad_rows: int = 0, holdout: float = 0.0, heldout_side: bool = False
    ):
        self.sources, self.max_bad_rows = tuple(sources), max_bad_rows
        self.holdout, self.heldout_side = holdout, heldout_side
        self._ends = np.cumsum([len(source) for source in self.sources], dtype=np.int64)

    @cached_property
    def per_source(self) -> list[tuple[str, int]]:
        """The name and the number of candidate rows of each source."""
        return [(source.name, len(source)) for source in self.sources]

    def weights(self, trained: Sequence[float]) -> list[float]:
        """The weight of each source; of those that are replayed the one that gives them their share.

        trained: the trained tokens of each source. UserError where one to be replayed has none.
        """
        left = 1 - sum(source.replay for source in self.sources)
        new = sum(source.weight * count for source, count in zip(self.sources, trained) if not source.replay)
        weights = []
        for source, count in zip(self.sources, trained, strict=True):
            if source.replay and not count:
                raise UserError(f"{source.name}: none of its rows has a trained token, so there is nothing to replay")
            # In few digits: a fraction of them says which rows each epoch has.
            weights.append(float(f"{source.replay / left * new / count:.6g}") if source.replay else source.weight)
        return weights

    def source_of(self, i: int) -> int:
        """The index in `sources` and `per_source` of the source of row i."""
        return self._locate(i)[0]

    def origin(self, i: int) -> str:
        """The origin of row i, without reading it."""
        source, local = self._locate(i)
        return self.sources[source].origin(local)

    def folder(self, i: int) -> str:
        """The directory from which the paths in row i start, "" where there is none."""
        source, local = self._locate(i)
        return self.sources[source].folder(local)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Row:
        """Row i, parsed and checked; UserError with its origin where it is bad. No slices."""
        source, local = self._locate(i)
        return self.sources[source].row(local)

    def raw(self, i: int) -> dict:
        """The fields of row i as they are stored, before any format is detected or checked."""
        source, local = self._locate(i)
        return self.sources[source].raw(local)

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return locate(self._ends, i)

    def check(self, i: int) -> Row | None:
        """Row i, or None where it is on the other side of the hold-out; UserError where it is bad."""
        row = self[i]
        if self.holdout and held_out(row.fields, self.holdout) != self.heldout_side:
            return None
        return row

    def __iter__(self) -> Iterator[Row]:
        """The rows of this side in order, bad ones skipped as far as max_bad_rows allows."""
        bad, used = BadRows(self), np.zeros(len(self.sources), np.int64)
        for i in range(len(self)):
            try:
                row = self.check(i)
            except SourceError:  # the file was changed or is gone: never a bad row
                raise
            except UserError as error:
                bad.skip(i, str(error))
                continue
            if row is not None:
                used[self.source_of(i)] += 1
                yield row
        bad.refuse(used)
        log_skipped(self, used, bad.skipped)

    def digest(self) -> str:
        """Hex digest of all that decides the rows and their order: contents, formats, splits, limits, the hold-out.

        max_bad_rows is part of it: a run that allows no bad rows must not use what was made while skipping some.
        Weights are not: they decide the order of an epoch, not its rows.
        """
        contents = [source.digest() for source in self.sources]
        options = [self.max_bad_rows, self.holdout, self.heldout_side if self.holdout else False]
        return hashlib.sha256(json.dumps([contents, options]).encode()).hexdigest()


class BadRows:
    """Counts the bad rows of each source and refuses more than `rows.max_bad_rows` of one."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self.skipped: dict[int, tuple[int, str]] = {}  # source -> how many, and the message of the first

    def skip(self, i: int, message: str) -> None:
        """Counts row i as bad. Above max_bad_rows raises UserError, with just the message where none is allowed."""
        allowed, source = self._rows.max_bad_rows, self._rows.source_of(i)
        if allowed == 0:
            raise UserError(message)
        count, first = self.skipped.get(source, (0, message))
        self.skipped[source] = (count + 1, first)
        if count + 1 > allowed:
            raise UserError(
                f"more than {allowed} bad rows; fix them or raise max_bad_rows. First: {first}; last: {message}"
            )

    def refuse(self, used: Sequence[int] | np.ndarray) -> None:
        """UserError where all rows of a source are bad, or no row at all is on this side of the hold-out.

        used: as in `log_skipped`.
        """
        for source, (count, first) in sorted(self.skipped.items()):
            name, total = self._rows.per_source[source]
            if count == total:
                raise UserError(f"{name}: no rows are left of {total}, all are bad; first: {first}")
        if not sum(used):
            share, side = self._rows.holdout, "held out" if self._rows.heldout_side else "left for training"
            raise UserError(
                f"with data.holdout = {share:g}, none of {len(self._rows)} rows is {side} (rows of one prompt stay "
                "together); set another share, or 0, or add rows with other prompts"
            )


def log_skipped(rows: Rows, used: Sequence[int] | np.ndarray, bad: Mapping[int, tuple[int, str]]) -> None:
    """Logs what was skipped, and each source of which the hold-out takes all rows or none.

    Args:
      used: how many rows of each source were good and on this side of the hold-out.
      bad: source -> how many of its rows were bad, and the message of the first.
    """
    for source, (name, total) in enumerate(rows.per_source):
        count, first = bad.get(source, (0, ""))
        if count:
            text = "%s: skipped %d bad rows of %d (at most %d allowed); first: %s"
            log.warning(text, name, count, total, rows.max_bad_rows, first)
        good = total - count
        if rows.holdout and not rows.heldout_side and good and used[source] in (0, good):
            text = "%s: data.holdout = %g holds out %s of its %d rows; rows of one prompt stay together"
            log.warning(text, name, rows.holdout, "none" if used[source] else f"all {good}", good)
