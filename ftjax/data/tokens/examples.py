"""Tokenized documents as a few flat arrays: in memory where they are few, else in memory-mapped files of a cache.

A cached set is a directory `KEY` of one file per array and a `cache.json` with the size and digest of each. It is
written beside its place and renamed when whole, and read through on opening: one that is torn, cut or has a flipped bit
is made again, never trained on. Directories may be deleted at any time; the next run makes what it needs.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ftjax import atomic
from ftjax.data.format.example import Document, Example, Row
from ftjax.errors import UserError

log = logging.getLogger(__name__)

# One entry per token in the first, per document in the second, per example in the others.
COLUMNS = {"tokens": "<i4", "lengths": "<i4", "rows": "<i8", "sources": "<i4"}
TRAINED = np.int32(-(2**31))  # the flag in a token that it is predicted with loss
_ID = np.int32(2**31 - 1)  # the rest of it
_BLOCK = 2**26  # bytes that one thread hashes at a time


@dataclass(frozen=True)
class Part:
    """One tokenized set of rows: its column of tokens, flagged, and the rows for what messages say."""

    tokens: np.ndarray
    rows: Sequence[Row]


@dataclass(frozen=True)
class Examples:
    """A sequence of `Example`; `documents_of(i)` are the documents of one, without its origin.

    Attributes:
      lengths: int32 [N], tokens of each, all its documents together; all 1 or more.
      document_lengths: int32 [N, K], those of its documents: a conversation is one, a pair two.
      source_ids: int32 [N], which entry of the data each comes from; an index into `weights`.
      weights: how often an epoch has the examples of each source.
      digest: sha256 (hex) of all tokens, masks and lengths in their order, and of the tokenizer and its template.
      report: what was counted while tokenizing (see `tokenize.tokenize`).
      parts, part_ids, starts, rows: where the tokens of each example are, and which row it was.
    """

    parts: tuple[Part, ...]
    part_ids: np.ndarray | None  # uint8 [N]; None where there is but one
    starts: np.ndarray  # int64 [N]
    lengths: np.ndarray
    document_lengths: np.ndarray
    rows: np.ndarray  # int64 [N]
    source_ids: np.ndarray
    weights: tuple[float, ...]
    digest: str
    report: dict

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, document_lengths: np.ndarray, **others) -> "Examples":
        """Of a set whose tokens lie in one part, in the order of the examples; `others` are the attributes left."""
        lengths = document_lengths.sum(axis=1, dtype=np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return cls(part_ids=None, starts=starts, lengths=lengths, document_lengths=document_lengths, **others)

    def __getitem__(self, index: int) -> Example:
        return Example.of(self.documents_of(index), self.origin(index))

    def documents_of(self, index: int) -> list[Document]:
        """Views of the example's tokens; reads no row."""
        column, start, documents = self._part(index).tokens, self.starts[index], []
        for length in self.document_lengths[index]:
            flagged, start = column[start : start + length], start + length
            documents.append(Document(flagged & _ID, flagged < 0))
        return documents

    def origin(self, index: int) -> str:
        """file:line of the row; reads the row again."""
        return self._part(index).rows[int(self.rows[index])].origin

    def _part(self, index: int) -> Part:
        return self.parts[0 if self.part_ids is None else self.part_ids[index]]


def join(sets: Sequence[Examples]) -> Examples:
    """All examples of several sets, one after the other; the report is the first's."""
    if len(sets) == 1:
        return sets[0]
    first_part = np.cumsum([0, *(len(one.parts) for one in sets)])
    first_source = np.cumsum([0, *(len(one.weights) for one in sets)])
    part_ids = [
        k + (np.zeros(len(one), int) if one.part_ids is None else one.part_ids) for k, one in zip(first_part, sets)
    ]
    return Examples(
        tuple(part for one in sets for part in one.parts),
        np.concatenate(part_ids).astype(np.uint8),
        np.concatenate([one.starts for one in sets]),
        np.concatenate([one.lengths for one in sets]),
        np.concatenate([one.document_lengths for one in sets]),
        np.concatenate([one.rows for one in sets]),
        np.concatenate([k + one.source_ids for k, one in zip(first_source, sets)]),
        tuple(weight for one in sets for weight in one.weights),
        hashlib.sha256(" ".join(one.digest for one in sets).encode()).hexdigest(),
        sets[0].report,
    )


class Columns(NamedTuple):
    """The arrays of COLUMNS, sha256 (hex) of the tokens and lengths, and what else was built (JSON)."""

    arrays: dict[str, np.ndarray]
    digest: str
    header: dict


# `build(append)` calls `append(name, array)` as often as it likes and returns the header.
Build = Callable[[Callable[[str, np.ndarray], None]], dict]


def in_memory(build: Build) -> Columns:
    """What `build` appends, held in memory."""
    buffers = {name: io.BytesIO() for name in COLUMNS}
    header = build(_appender(buffers))
    arrays = {name: np.frombuffer(buffer.getbuffer(), COLUMNS[name]) for name, buffer in buffers.items()}
    return Columns(arrays, _content({name: digest_of(array) for name, array in arrays.items()}), header)


def cached(directory: Path, key: str, build: Build) -> Columns:
    """As `in_memory`, but mapped from `directory / key`, which is written first where it is absent or damaged.

    Raises:
      UserError: the directory cannot be written.
    """
    place = directory / key
    if place.exists():
        if (found := _open(place)) is not None:
            return found
        log.warning("%s is damaged; it is made again", place)
    with _keeping(directory):
        _sweep(directory)
    with _beside(place) as temporary:
        _write(temporary, build)
        with _keeping(directory):
            _replace(temporary, place)
    if (found := _open(place)) is None:
        raise UserError(f"{place} does not read back as it was written; set FTJAX_CACHE to another place")
    return found


def digest_of(array: np.ndarray) -> str:
    """sha256 of the sha256 of each block, so that all cores share the work; about 1.5 GB/s on each."""
    content = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else memoryview(b"")
    blocks = [content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda block: hashlib.sha256(block).digest(), blocks))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _content(digests: dict[str, str]) -> str:
    return hashlib.sha256(f"{digests['tokens']} {digests['lengths']}".encode()).hexdigest()


def _appender(files: dict[str, BinaryIO]) -> Callable[[str, np.ndarray], None]:
    def append(name: str, array: np.ndarray) -> None:
        files[name].write(np.ascontiguousarray(array, COLUMNS[name]).data)

    return append


def _write(temporary: Path, build: Build) -> None:
    directory = temporary.parent
    with contextlib.ExitStack() as stack:
        with _keeping(directory):
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in COLUMNS}
        append = _appender(files)

        def keep(name: str, array: np.ndarray) -> None:
            with _keeping(directory):
                append(name, array)

        header = build(keep)
        with _keeping(directory):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    with _keeping(directory):
        columns = {name: _map(temporary, name) for name in COLUMNS}
        described = {name: {"size": column.size, "sha256": digest_of(column)} for name, column in columns.items()}
        text = json.dumps({"columns": described, "header": header})
        with open(temporary / "cache.json", "w", encoding="utf-8") as file:
            file.write(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n" + text)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _keeping(directory: Path) -> Iterator[None]:
    """UserError for a place that cannot be written; not around `build`, whose own failures are others."""
    try:
        yield
    except OSError as error:
        what = error.strerror or error
        raise UserError(
            f"{directory}: tokenized data cannot be kept there ({what}); make room, or set FTJAX_CACHE to another place"
        ) from error


def _open(place: Path) -> Columns | None:
    """What is cached there, or None where anything is not as it was written."""
    try:
        outer, text = (place / "cache.json").read_text(encoding="utf-8").split("\n")
        if json.loads(outer)["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        content = json.loads(text)
        arrays = {name: _map(place, name) for name in COLUMNS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(array.size != content["columns"][name]["size"] for name, array in arrays.items()):
        return None
    digests = {name: digest_of(array) for name, array in arrays.items()}
    if any(digest != content["columns"][name]["sha256"] for name, digest in digests.items()):
        return None
    return Columns(arrays, _content(digests), content["header"])


def _map(directory: Path, name: str) -> np.ndarray:
    path = directory / f"{name}.bin"
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, COLUMNS[name])
    return np.memmap(path, COLUMNS[name], "r").view(np.ndarray)


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A directory beside `place`, locked while this process lives, and removed afterwards if it is still there."""
    temporary = atomic.beside(place)
    with _keeping(place.parent):
        temporary.mkdir()
    try:
        with open(temporary / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, place: Path) -> None:
    old = atomic.beside(place)
    with contextlib.suppress(FileNotFoundError):
        place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        if not place.exists():  # else another run has just put its own there, which is the same
            raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Removes what killed runs left beside the cached sets."""
    for temporary in directory.glob("*.tmp-*"):
        try:
            with open(temporary / "lock", "rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(temporary, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):  # in use, or just being made or removed
            continue
