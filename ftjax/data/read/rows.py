"""The rows of all sources of a run as one sequence: read, parsed and checked when they are asked for.

Opening finds where the rows are, and no more. Whoever passes over all rows before step 1 (tokenization) must do it so,
in any processes and any order, for a bad row is only found by parsing it:

    bad = BadRows(rows)
    for i in range(len(rows)):          # or ranges of i in worker processes: `rows` can be pickled
        try:
            row = rows.check(i)         # None: the row belongs to the other side of data.holdout
        except SourceError:             # the file was changed or is gone: never a bad row
            raise
        except UserError as error:
            bad.skip(i, str(error))     # counts it; raises where more than max_bad_rows of its source are bad
            continue
        ...
    bad.report(used)                    # logs what was skipped; raises for a source of which no row is left

Iterating over `rows` is exactly that in this process. `rows.digest()` names the contents and everything here that
decides which rows are used, for a cache of what was made of them.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ftjax.data.format.example import Row
from ftjax.data.format.formats import check_row
from ftjax.data.read.holdout import held_out
from ftjax.errors import SourceError, UserError

log = logging.getLogger(__name__)


class Records(Protocol):
    """What is read from one place, as it stands there: random access, from any thread, and picklable."""

    def __len__(self) -> int: ...

    def origin(self, i: int) -> str:
        """The place that messages name: "file.jsonl:12"."""

    def __getitem__(self, i: int) -> dict:
        """The fields of record i as plain values; UserError that starts with its origin where it is damaged."""

    def digest(self) -> str:
        """Hex digest of the contents, whatever their place, compression or time."""


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval, opened.

    Attributes:
      name: the entry's `source`, and its `split` where it has one.
      records: all that is there.
      chosen: the records that `split` and `limit` leave, rising: a range, or int64 [n].
      format: a key of `formats.FORMATS`, or None to detect it row by row.
      weight: how many times an epoch has each row (0.5: every second row).
    """

    name: str
    records: Records
    chosen: Sequence[int] | np.ndarray
    format: str | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.chosen)

    def origin(self, i: int) -> str:
        return self.records.origin(self._record(i))

    def row(self, i: int) -> Row:
        record = self._record(i)
        return check_row(self.records[record], self.records.origin(record), self.format)

    def _record(self, i: int) -> int:
        return int(self.chosen[i])

    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps([self.records.digest(), self.format]).encode())
        if isinstance(self.chosen, range):
            digest.update(repr(self.chosen).encode())
        else:
            digest.update(self.chosen.astype("<i8").data)
        return digest.hexdigest()


class Rows(Sequence[Row]):
    """Rows of several sources, one after the other. See the module for how to pass over them.

    `len` and `[i]` count every candidate: rows that turn out bad, and those of the other side of the hold-out, have an
    index too. Only iteration leaves these out.

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

    @property
    def weights(self) -> list[float]:
        """The weight of each source."""
        return [source.weight for source in self.sources]

    def source_of(self, i: int) -> int:
        """The place in `sources` and `per_source` of the source of row i."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return int(np.searchsorted(self._ends, i, side="right"))

    def origin(self, i: int) -> str:
        """The origin of row i, without reading it."""
        source, at = self._find(i)
        return source.origin(at)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Row:
        """Row i, parsed and checked; UserError with its origin where it is bad. No slices."""
        source, at = self._find(i)
        return source.row(at)

    def _find(self, i: int) -> tuple[Source, int]:
        at = self.source_of(i)
        return self.sources[at], i - int(self._ends[at]) + len(self.sources[at])

    def check(self, i: int) -> Row | None:
        """Row i, or None where it belongs to the other side of the hold-out; UserError where it is bad."""
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
            except SourceError:
                raise
            except UserError as error:
                bad.skip(i, str(error), error)
                continue
            if row is not None:
                used[self.source_of(i)] += 1
                yield row
        bad.report(used)

    def digest(self) -> str:
        """Hex digest of all that decides the rows and their order: contents, formats, splits, limits, the hold-out.

        max_bad_rows is among it: what was made with rows skipped is not for a run that allows none. Weights are not:
        they decide the order of an epoch, not the rows.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [source.digest() for source in self.sources]
        options = [self.max_bad_rows, self.holdout, self.heldout_side if self.holdout else False]
        return hashlib.sha256(json.dumps([parts, options]).encode()).hexdigest()


class BadRows:
    """Counts the bad rows of each source and refuses more than `rows.max_bad_rows` of one."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._messages: dict[int, tuple[int, str]] = {}  # source -> how many, the message of the first

    def skip(self, i: int, message: str, error: UserError | None = None) -> None:
        """Row i is bad, as `message` says. Raises UserError (`error` itself where none may be) above max_bad_rows."""
        allowed, at = self._rows.max_bad_rows, self._rows.source_of(i)
        if allowed == 0:
            raise error or UserError(message)
        count, first = self._messages.get(at, (0, message))
        self._messages[at] = (count + 1, first)
        if count + 1 > allowed:
            raise UserError(
                f"more than {allowed} bad rows; mend them or raise max_bad_rows. First: {first}; last: {message}"
            ) from error

    def report(self, used: Sequence[int] | np.ndarray) -> None:
        """Logs what was skipped. `used`: how many rows of each source were good and on this side of the hold-out.

        Raises:
          UserError: all rows of a source are bad, or no row at all is on this side of the hold-out.
        """
        self.refuse(used)
        tell(self._rows, used, self._messages)

    def refuse(self, used: Sequence[int] | np.ndarray) -> None:
        """As `report`, which logs something too."""
        for at, (count, first) in sorted(self._messages.items()):
            name, total = self._rows.per_source[at]
            if count == total:
                raise UserError(f"{name}: no rows are left of {total}, all are bad; first: {first}")
        if not sum(used):
            share, side = self._rows.holdout, "held out" if self._rows.heldout_side else "left for training"
            raise UserError(
                f"with data.holdout = {share:g}, none of {len(self._rows)} rows is {side} (rows of one prompt stay "
                "together); set another share, or 0, or add rows with other prompts"
            )


def tell(rows: Rows, used: Sequence[int] | np.ndarray, bad: Mapping[int, tuple[int, str]]) -> None:
    """Logs what was skipped, and the sources that the hold-out leaves whole.

    Args:
      used: how many rows of each source were good and on this side of the hold-out.
      bad: source -> how many of its rows were bad, and what is wrong with the first.
    """
    for at, (name, total) in enumerate(rows.per_source):
        count, first = bad.get(at, (0, ""))
        if count:
            text = "%s: skipped %d bad rows of %d (at most %d allowed); first: %s"
            log.warning(text, name, count, total, rows.max_bad_rows, first)
        good = total - count
        if rows.holdout and not rows.heldout_side and good and used[at] in (0, good):
            text = "%s: data.holdout = %g holds out %s of its %d rows; rows of one prompt stay together"
            log.warning(text, name, rows.holdout, "none" if used[at] else f"all {good}", good)
