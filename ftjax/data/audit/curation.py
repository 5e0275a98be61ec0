"""Rows of files chosen, split, mixed and converted, into new JSONL files: what `ftjax.curate` does.

Records pass through as they stand in their file, with every field they have; only `convert` writes others. Nothing here
holds more than a few bytes of each row in memory (signatures of near duplicates are in a temporary file).
"""

import contextlib
import datetime
import decimal
import gzip
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import atomic
from ftjax.data.audit import duplicates, private, quality
from ftjax.data.audit.parts import own_text, parts
from ftjax.data.format.example import Row
from ftjax.data.read.holdout import prompt_key
from ftjax.data.read.rows import Rows
from ftjax.errors import SourceError, UserError

_PLACES = 3


class Record(NamedTuple):
    """A record as it stands in its file, its place among all rows of the inputs, and the row that it is."""

    index: int
    fields: dict
    row: Row


@dataclass
class Drops:
    """What was left out: how often for each reason, and the first places. `file`: where they are written, or None."""

    file: "Output | None" = None
    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, origin: str, reason: str, detail: str = "", fields: dict | None = None) -> None:
        count, places = self.reasons.get(reason, (0, []))
        if len(places) < _PLACES:
            places.append(f"{origin} ({detail})" if detail else origin)
        self.reasons[reason] = count + 1, places
        if self.file is not None:
            self.file.write({"origin": origin, "reason": reason, "detail": detail, "row": fields})

    def total(self) -> int:
        return sum(count for count, _ in self.reasons.values())


def records(rows: Rows, drops: Drops) -> Iterator[Record]:
    """All records of the inputs in order; those that cannot be read or fit no format are dropped, with the reason."""
    for index in range(len(rows)):
        try:
            row = rows[index]
            yield Record(index, raw(rows, index), row)
        except SourceError:
            raise
        except UserError as error:
            origin = str(error).split(": ", 1)[0]
            drops.add(origin, "cannot be read", str(error).removeprefix(origin).strip(": "))


def raw(rows: Rows, index: int) -> dict:
    """The fields of a record as they stand in its file."""
    at = rows.source_of(index)
    source = rows.sources[at]
    local = index - sum(count for _, count in rows.per_source[:at])
    return source.records[int(source.chosen[local])]


class Output:
    """A JSONL file (.gz: compressed) that appears whole when it is closed without an error, or not at all.

    Raises:
      UserError: the file exists and `overwrite` is False; it is one of `inputs`.
    """

    def __init__(self, path: Path, inputs: Sequence[Path] = (), overwrite: bool = False):
        self.path, self.count = Path(path), 0
        if any(self.path.resolve() == one.resolve() or _same(self.path, one) for one in inputs):
            raise UserError(
                f"{path}: is one of the inputs; name another file, curation never writes onto what it reads"
            )
        if self.path.exists() and not overwrite:
            raise UserError(f"{path} exists; name another file or give --overwrite")
        if self.path.is_dir():
            raise UserError(f"{path}: is a directory; name a file in it")
        self._files = contextlib.ExitStack()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._files.enter_context(atomic.new_file(self.path))
            self._raw = self._files.enter_context(temporary.open("wb"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
        self._file = gzip.GzipFile("", "wb", 6, self._raw, mtime=0) if self.path.suffix == ".gz" else self._raw

    def write(self, fields: dict) -> None:
        """Dates and decimal numbers of a table are written as text; UserError for what JSON has no form for."""
        text = json.dumps(fields, ensure_ascii=False, default=_as_json)
        if not _encodes(text):  # half of a surrogate pair, which JSON can only spell as \\ud800
            text = json.dumps(fields, default=_as_json)
        self.write_text(text + "\n")

    def write_text(self, text: str) -> None:
        self._file.write(text.encode(errors="backslashreplace"))
        self.count += 1

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error) -> None:
        if self._file is not self._raw:
            self._file.close()
        self._files.__exit__(*error)


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_json(value: object) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise UserError(
        f"a row has a field of {type(value).__name__}, which JSON cannot hold; leave it out of the table, or write it "
        "as text"
    )


def dedup(
    rows: Rows, out: Output, drops: Drops, near: bool, threshold: float, by_prompt: bool, against: Rows | None
) -> Drops:
    """Keeps the first of rows that are alike, and none that is like a row of `against`; returns what of `against`
    cannot be read.

    Args:
      near: compare by `duplicates.signature`, alike being a similarity of `threshold`; else by a hash of the whole row,
        white space included.
      by_prompt: only compare what is asked (rows of text: all of it).
    """

    def text(row: Row) -> tuple[str, ...]:
        own = parts(row.fields)
        if by_prompt and own.prompt:
            return (own.prompt,)
        return (own_text(row.fields),) if near else own.texts()

    places, marks = _measured(rows, text, near, drops)
    unread = Drops()
    others, other_marks = (
        (np.zeros(0, np.int64), marks[:0]) if against is None else _measured(against, text, near, unread)
    )
    if near:
        first = duplicates.clusters(len(places), duplicates.near_pairs(marks, threshold))
        like = np.full(len(places), -1)
        for ours, theirs in duplicates.near_across(marks, other_marks, threshold):
            like[ours] = theirs
    else:
        first = duplicates.first_of_equal(marks)
        like = _found_in(marks, other_marks)
    what = f"nearly as an earlier row (similarity {threshold:g} or more)" if near else "as an earlier row"
    for k, place in enumerate(places.tolist()):
        origin = rows[place].origin
        if like[k] >= 0:
            drops.add(origin, "in --against", f"as {against[int(others[like[k]])].origin}", raw(rows, place))
        elif first[k] != k:
            drops.add(origin, what, f"as {rows[int(places[first[k]])].origin}", raw(rows, place))
        else:
            out.write(raw(rows, place))
    return unread


def filter_rows(
    rows: Rows, out: Output, drops: Drops, tests: Sequence[Callable[[Row], tuple[str, str] | None]]
) -> None:
    """Keeps the rows that no test gives a (reason, detail) for."""
    for record in records(rows, drops):
        reason = next((found for test in tests if (found := test(record.row))), None)
        if reason:
            drops.add(record.row.origin, *reason, record.fields)
        else:
            out.write(record.fields)


def length_test(
    low: float, high: float, unit: str, count: Callable[[Row], int]
) -> Callable[[Row], tuple[str, str] | None]:
    """Of rows whose `count`, in `unit`, is not from low to high."""

    def test(row: Row) -> tuple[str, str] | None:
        n = count(row)
        if n < low:
            return f"fewer than {low:g} {unit}", f"{n}"
        return (f"more than {high:g} {unit}", f"{n}") if n > high else None

    return test


def quality_test(limits: dict[str, float]) -> Callable[[Row], tuple[str, str] | None]:
    """Of rows one of whose answers breaks a rule of `quality`."""

    def test(row: Row) -> tuple[str, str] | None:
        for answer in parts(row.fields).answers:
            for name, value in quality.faults(answer, limits):
                sign = ">" if quality.RULES[name][1] == "max" else "<"
                return f"quality: {name} {sign} {limits[name]:g}", f"{value:.2f}"
        return None

    return test


def private_test(row: Row) -> tuple[str, str] | None:
    """Of rows with what looks private; it is never written out in the table."""
    own = parts(row.fields)
    for kind, _, hidden in private.find("\n".join((own.prompt, *own.answers))):
        return f"private: {private.KINDS[kind]}", hidden
    return None


def garbled_test(row: Row) -> tuple[str, str] | None:
    own = parts(row.fields)
    place = next(private.garbled("\n".join((own.prompt, *own.answers))), None)
    return None if place is None else ("garbled characters", f"character {place}")


def characters(row: Row) -> int:
    return len(own_text(row.fields))


def split(rows: Rows, outs: Sequence[Output], shares: Sequence[float], drops: Drops, seed: int) -> None:
    """Each row to one of the outputs, by a hash of its prompt: all answers to a prompt stay together.

    Args:
      shares: of each output but the first, which gets the rest; together less than 1.
    """
    ends = np.cumsum(shares)
    for record in records(rows, drops):
        digest = hashlib.blake2b(prompt_key(record.row.fields).encode(errors="surrogatepass"), digest_size=8)
        digest.update(f"split {seed}".encode())
        at = int(np.searchsorted(ends, int.from_bytes(digest.digest(), "big") / 2.0**64, side="right"))
        outs[0 if at == len(shares) else at + 1].write(record.fields)


def mix(rows: Rows, out: Output, drops: Drops, weights: Sequence[float], total: int | None, seed: int) -> list[int]:
    """Rows of each input in proportion to its weight, shuffled; returns how many of each.

    total: rows to write; None: as many as can be without repeating a row. An input that has too few gives its rows
    several times.
    """
    by_source: list[list[int]] = [[] for _ in rows.sources]
    for record in records(rows, drops):
        by_source[rows.source_of(record.index)].append(record.index)
    for (name, _), found in zip(rows.per_source, by_source):
        if not found:
            raise UserError(f"{name}: has no row that can be read; leave it out of the mixture")
    whole = sum(weights)
    if total is None:
        total = int(min(len(found) / weight for found, weight in zip(by_source, weights)) * whole + 1e-9)
    ends = np.round(np.cumsum(weights) / whole * total).astype(int)
    quotas = np.diff(ends, prepend=0).tolist()
    chosen = [_draw(found, quota, seed, k) for k, (found, quota) in enumerate(zip(by_source, quotas))]
    together = np.concatenate(chosen)
    for place in together[_order(len(together), seed, len(chosen))].tolist():
        out.write(raw(rows, place))
    return quotas


def sample(rows: Rows, count: int, seed: int, drops: Drops) -> Iterator[Record]:
    """`count` rows of all (all, where there are fewer), drawn by the seed, in their order."""
    readable = np.array([record.index for record in records(rows, drops)], np.int64)
    for place in np.sort(readable[_order(len(readable), seed, 0)[:count]]).tolist():
        yield Record(place, raw(rows, place), rows[place])


def as_text(record: Record) -> str:
    """A row for reading: each field and turn under its name."""
    lines = [f"=== {record.row.origin}"]
    for name, value in record.row.fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
            prefix = "" if name == "messages" else f"{name} "
            for turn in value:
                lines.append(f"--- {prefix}{turn['role']}")
                said = turn.get("content")
                lines.append(said if isinstance(said, str) else json.dumps(turn, ensure_ascii=False))
        else:
            lines += [f"--- {name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return "\n".join(lines) + "\n\n"


def _measured(
    rows: Rows, text: Callable[[Row], tuple[str, ...]], near: bool, drops: Drops
) -> tuple[np.ndarray, np.ndarray]:
    """The places of all rows that can be read, int64 [n], and their hashes, uint64 [n], or signatures."""
    places, keys, signatures = array("q"), array("Q"), duplicates.Signatures()
    for record in records(rows, drops):
        said = text(record.row)
        places.append(record.index)
        if near:
            signatures.add(said[0])
        else:
            keys.append(duplicates.exact(*said))
    return np.array(places, np.int64), signatures.take() if near else np.array(keys, np.uint64)


def _found_in(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """int64: where each key stands among the others, -1 where it does not."""
    if not len(others):
        return np.full(len(keys), -1)
    order = np.argsort(others, kind="stable")
    ranked = np.asarray(others)[order]
    at = np.minimum(np.searchsorted(ranked, keys), len(ranked) - 1)
    return np.where(ranked[at] == keys, order[at], -1)


def _draw(places: Sequence[int], quota: int, seed: int, stream: int) -> np.ndarray:
    """`quota` of the places: all as often as whole times go, then some of them once more."""
    times, rest = divmod(quota, len(places))
    found = np.array(places, np.int64)
    return np.concatenate([np.tile(found, times), found[_order(len(found), seed, 1000 + stream)[:rest]]])


def _order(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation by (seed, stream) that stays the same in later versions of NumPy: sorted raw bits."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(n), kind="stable")
