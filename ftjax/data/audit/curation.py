"""What `ftjax.curate` does: rows of files chosen, split, mixed and converted, into new JSONL files.

Rows are written as they stand in their file, with every field they have, except by `convert`. Nothing here holds more
than a few bytes of each row in memory (signatures of near duplicates are in a temporary file).
"""

import contextlib
import datetime
import decimal
import gzip
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import atomic
from ftjax.data.audit import duplicates, private, quality
from ftjax.data.audit.parts import near_text, own_text, parts
from ftjax.data.batch.permutation import permutation
from ftjax.data.format import images
from ftjax.data.format.example import Row
from ftjax.data.read.holdout import prompt_hash
from ftjax.data.read.rows import Rows
from ftjax.errors import SourceError, UserError

_PLACES = 3  # that are shown for each reason
# A test of a row: None where the row is good, else the reason to drop it and a detail.
Test = Callable[[Row], tuple[str, str] | None]


class Record(NamedTuple):
    """A row of the inputs."""

    index: int  # among all rows of the inputs
    fields: dict  # as they stand in the file
    row: Row  # after the checks of its format


@dataclass
class Drops:
    """How many rows were dropped for each reason, and the first places. `file`: where they are written, or None."""

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
    """All rows of the inputs in order; those that cannot be read or fit no format are dropped, with the reason."""
    for index in range(len(rows)):
        try:
            row = rows[index]
            yield Record(index, rows.raw(index), row)
        except SourceError:
            raise
        except UserError as error:
            origin = str(error).split(": ", 1)[0]
            drops.add(origin, "cannot be read", str(error).removeprefix(origin).strip(": "))


class Output:
    """A JSONL file (.gz: compressed) that appears whole when it is closed without an error, or not at all.

    Raises:
      UserError: the file exists and `overwrite` is False; it is one of `inputs`.
    """

    def __init__(self, path: Path, inputs: Sequence[Path] = (), overwrite: bool = False):
        self.path, self.count = Path(path), 0
        if any(self.path.resolve() == path.resolve() or _same_file(self.path, path) for path in inputs):
            raise UserError(f"{path}: is one of the inputs, which are never overwritten; name another file")
        if self.path.exists() and not overwrite:
            raise UserError(f"{path} exists; name another file or give --overwrite")
        if self.path.is_dir():
            raise UserError(f"{path}: is a directory; name a file in it")
        self._files = contextlib.ExitStack()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._files.enter_context(atomic.new_file(self.path))
            self._file = self._files.enter_context(temporary.open("wb"))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); name a file in another directory"
            ) from error
        if self.path.suffix == ".gz":
            self._file = self._files.enter_context(gzip.GzipFile("", "wb", 6, self._file, mtime=0))

    def write(self, fields: dict) -> None:
        """One row. Dates and decimal numbers of a table become text; UserError for a value that JSON cannot hold."""
        self.write_text(json.dumps(fields, ensure_ascii=False, default=_as_json) + "\n")

    def write_text(self, text: str) -> None:
        # Half of a surrogate pair, which UTF-8 cannot hold, becomes \ud800, as JSON spells it.
        self._file.write(text.encode(errors="backslashreplace"))
        self.count += 1

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *error) -> None:
        self._files.__exit__(*error)


def _same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _as_json(value: object) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise UserError(
        f"a row has a field of {type(value).__name__}, which JSON cannot hold; remove it from the table, write it "
        "as text, or, if it is an image, write the rows with `convert` first"
    )


def dedup(
    rows: Rows, out: Output, drops: Drops, near: bool, threshold: float, by_prompt: bool, against: Rows | None
) -> Drops:
    """Keeps the first of rows that are alike, and none that is like a row of `against`.

    Args:
      near: rows are alike whose signatures have a similarity of `threshold` or more (`duplicates.signature`); else
        those that are equal, white space included.
      by_prompt: only compare the prompts (of rows of text, all of it).

    Returns: the rows of `against` that cannot be read.
    """

    def text(row: Row) -> tuple[str, ...]:
        own = parts(row.fields)
        if by_prompt and own.prompt:
            return (own.prompt,)
        return (near_text(row.fields),) if near else own.texts()

    indices, keys = _comparison_keys(rows, text, near, drops)
    unread = Drops()
    other_indices, other_keys = np.zeros(0, np.int64), keys[:0]
    if against is not None:
        other_indices, other_keys = _comparison_keys(against, text, near, unread)
    if near:
        first = duplicates.clusters(len(indices), duplicates.near_pairs(keys, threshold))
        like = np.full(len(indices), -1)
        for ours, theirs in duplicates.near_across(keys, other_keys, threshold):
            like[ours] = theirs
    else:
        first = duplicates.first_of_equal(keys)
        like = duplicates.index_in(keys, other_keys)
    reason = f"nearly as an earlier row (similarity {threshold:g} or more)" if near else "as an earlier row"
    for k, index in enumerate(indices.tolist()):
        origin = rows[index].origin
        if like[k] >= 0:
            drops.add(origin, "in --against", f"as {against[int(other_indices[like[k]])].origin}", rows.raw(index))
        elif first[k] != k:
            drops.add(origin, reason, f"as {rows[int(indices[first[k]])].origin}", rows.raw(index))
        else:
            out.write(rows.raw(index))
    return unread


def filter_rows(rows: Rows, out: Output, drops: Drops, tests: Sequence[Test]) -> None:
    """Keeps the rows that pass all tests."""
    for record in records(rows, drops):
        failure = next((failure for test in tests if (failure := test(record.row))), None)
        if failure:
            drops.add(record.row.origin, *failure, record.fields)
        else:
            out.write(record.fields)


def length_test(low: float, high: float, unit: str, count: Callable[[Row], int]) -> Test:
    """Fails rows whose `count`, in `unit`, is not from low to high."""

    def test(row: Row) -> tuple[str, str] | None:
        n = count(row)
        if n < low:
            return f"fewer than {low:g} {unit}", f"{n}"
        return (f"more than {high:g} {unit}", f"{n}") if n > high else None

    return test


def quality_test(limits: dict[str, float]) -> Test:
    """Fails rows of which an answer breaks a rule of `quality`."""

    def test(row: Row) -> tuple[str, str] | None:
        for answer in parts(row.fields).answers:
            for name, value in quality.faults(answer, limits):
                sign = ">" if quality.RULES[name][1] == "max" else "<"
                return f"quality: {name} {sign} {limits[name]:g}", f"{value:.2f}"
        return None

    return test


def private_test(row: Row) -> tuple[str, str] | None:
    """Fails rows with a string that looks private; the detail shows it masked."""
    own = parts(row.fields)
    for name, _, masked in private.matches("\n".join((own.prompt, *own.answers))):
        return f"private: {private.PATTERNS[name]}", masked
    return None


def garbled_test(row: Row) -> tuple[str, str] | None:
    """Fails rows with text that was decoded wrongly."""
    own = parts(row.fields)
    offset = next(private.garbled("\n".join((own.prompt, *own.answers))), None)
    return None if offset is None else ("garbled characters", f"character {offset}")


def characters(row: Row) -> int:
    return len(own_text(row.fields))


def split(rows: Rows, outs: Sequence[Output], shares: Sequence[float], drops: Drops, seed: int) -> None:
    """Each row to one of the outputs, by a hash of its prompt: all answers to a prompt stay together.

    Args:
      shares: of each output but the first, which gets the rest; together less than 1.
    """
    ends, outs = np.cumsum(shares), [*outs[1:], outs[0]]  # the rest is beyond the last end
    for record in records(rows, drops):
        position = prompt_hash(record.row.fields, f"split {seed}") / 2.0**64
        outs[int(np.searchsorted(ends, position, side="right"))].write(record.fields)


def mix(rows: Rows, out: Output, drops: Drops, weights: Sequence[float], total: int | None, seed: int) -> list[int]:
    """Rows of each input in proportion to its weight, shuffled; returns how many of each.

    Args:
      total: rows to write; None: as many as possible without repeating a row. An input that has too few gives its rows
        several times.
    """
    by_source: list[list[int]] = [[] for _ in rows.sources]
    for record in records(rows, drops):
        by_source[rows.source_of(record.index)].append(record.index)
    for (name, _), indices in zip(rows.per_source, by_source):
        if not indices:
            raise UserError(f"{name}: has no row that can be read; leave it out of the mixture")
    whole = sum(weights)
    if total is None:
        total = int(min(len(indices) / weight for indices, weight in zip(by_source, weights)) * whole + 1e-9)
    ends = np.round(np.cumsum(weights) / whole * total).astype(int)
    quotas = np.diff(ends, prepend=0).tolist()
    drawn = [_draw(indices, quota, seed, k) for k, (indices, quota) in enumerate(zip(by_source, quotas))]
    mixed = np.concatenate(drawn)
    for index in mixed[permutation(len(mixed), seed, len(drawn))].tolist():
        out.write(rows.raw(index))
    return quotas


def sample(rows: Rows, count: int, seed: int, drops: Drops) -> Iterator[Record]:
    """`count` of the rows (all, where there are fewer), drawn by the seed, in their order."""
    readable = np.array([record.index for record in records(rows, drops)], np.int64)
    for index in np.sort(readable[permutation(len(readable), seed, 0)[:count]]).tolist():
        yield Record(index, rows.raw(index), rows[index])


def as_text(record: Record) -> str:
    """A row for reading: each field and turn under its name."""
    lines = [f"=== {record.row.origin}"]
    for name, value in record.row.fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
            prefix = "" if name == "messages" else f"{name} "
            for turn in value:
                lines.append(f"--- {prefix}{turn['role']}")
                content = turn.get("content")
                if turn.get("images"):
                    content = content.replace(images.MARK, images.TAG)
                lines.append(content if isinstance(content, str) else json.dumps(turn, ensure_ascii=False))
        else:
            lines += [f"--- {name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return "\n".join(lines) + "\n\n"


def _comparison_keys(
    rows: Rows, text: Callable[[Row], tuple[str, ...]], near: bool, drops: Drops
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n], the indices of all rows that can be read, and what `text` gives of each: uint64 [n], its hash, or
    uint32 [n, SLOTS], its signature, where near."""
    indices, hashes, signatures = array("q"), array("Q"), duplicates.Signatures()
    for record in records(rows, drops):
        texts = text(record.row)
        indices.append(record.index)
        if near:
            signatures.add(texts[0])
        else:
            hashes.append(duplicates.exact_hash(*texts))
    return np.array(indices, np.int64), signatures.take() if near else np.array(hashes, np.uint64)


def _draw(indices: Sequence[int], quota: int, seed: int, stream: int) -> np.ndarray:
    """`quota` of the indices: all of them quota // n times, and a random part of them once more."""
    times, rest = divmod(quota, len(indices))
    rows = np.array(indices, np.int64)
    return np.concatenate([np.tile(rows, times), rows[permutation(len(rows), seed, 1000 + stream)[:rest]]])
