"""Tokenized documents as a few flat arrays: in memory if they are few, else in memory-mapped files of a cache.

A cached set is a directory `KEY` of one file per array and a `cache.json` with the size and digest of each. It is
written under a temporary name and renamed when complete, and all of it is read when it is opened: a set that is
incomplete or has a flipped bit is made again, never trained on. Directories may be deleted at any time; the next run
makes what it needs.
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
from ftjax.data.images.rules import ImageRules
from ftjax.errors import UserError

log = logging.getLogger(__name__)

# One entry per token in the first two, of which labels is empty for kinds of rows without; per document in the next,
# per example in the others, of which pictures (`Pictures.digest`) is empty where the model sees no images.
COLUMNS = {"tokens": "<i4", "labels": "<f4", "lengths": "<i4", "rows": "<i8", "sources": "<i4", "pictures": "<u8"}
_OPTIONAL = ("labels", "pictures")
TRAINED = np.int32(-(2**31))  # the bit of a token that says that it is predicted with loss
_ID = np.int32(2**31 - 1)  # its other bits
_BLOCK = 2**26  # bytes that one thread hashes at a time


@dataclass(frozen=True)
class Part:
    """One tokenized set of rows: its column of tokens with their flags, that of their labels, of size 0 where there are
    none, and the rows, whose origins messages name."""

    tokens: np.ndarray
    labels: np.ndarray
    rows: Sequence[Row]


@dataclass(frozen=True)
class Examples:
    """A sequence of `Example`; `documents_of(i)` gives the documents of one without reading its row."""

    parts: tuple[Part, ...]
    part_ids: np.ndarray | None  # uint8 [N]: the part of each example; None if there is only one part
    starts: np.ndarray  # int64 [N]: where its tokens begin in the part
    lengths: np.ndarray  # int32 [N]: its tokens, all its documents together; never 0
    document_lengths: np.ndarray  # int32 [N, K]: the tokens of each of its documents: a conversation is one, a pair two
    rows: np.ndarray  # int64 [N]: its row in the part
    source_ids: np.ndarray  # int32 [N]: which entry of the data it comes from; an index into `weights`
    weights: tuple[float, ...]  # how often an epoch has the examples of each source
    digest: str  # sha256 (hex) of all tokens, masks and lengths in their order, and of the tokenizer and its template
    report: dict  # what was counted while tokenizing (see `tokenize.tokenize`)
    replayed: tuple[bool, ...]  # which sources are general data that is replayed
    # float32 [N, K]: what a reference says of each document, log p of its trained tokens (`ftjax.cached_reference`);
    # None where it is asked in each step, or there is none
    reference_logps: np.ndarray | None = None
    images: ImageRules | None = None  # how the model sees the images of rows; None: there are none
    # uint64 [N]: `Pictures.digest` of the row of each, of its names and sizes; None or of size 0 where there are none
    pictures: np.ndarray | None = None

    @property
    def labeled(self) -> bool:
        """Whether documents have labels."""
        return any(part.labels.size for part in self.parts)

    @property
    def first_labels(self) -> np.ndarray:
        """float32 [N]: the label at the first token of each example, where documents have labels."""
        ids = np.zeros(len(self), np.uint8) if self.part_ids is None else self.part_ids
        out = np.zeros(len(self), np.float32)
        for number, part in enumerate(self.parts):
            out[ids == number] = part.labels[self.starts[ids == number]]
        return out

    @property
    def count(self) -> float:
        """How many an epoch has, by the weights of their sources."""
        return float(np.asarray(self.weights)[self.source_ids].sum())

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, document_lengths: np.ndarray, **others) -> "Examples":
        """From one part that holds the tokens in the order of the examples; `others` are the remaining attributes."""
        lengths = document_lengths.sum(axis=1, dtype=np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return cls(part_ids=None, starts=starts, lengths=lengths, document_lengths=document_lengths, **others)

    def __getitem__(self, index: int) -> Example:
        return Example.of(self.documents_of(index), self.origin(index))

    def documents_of(self, index: int) -> list[Document]:
        """The documents of an example; reads no row."""
        part, start, documents = self._part(index), self.starts[index], []
        for length in self.document_lengths[index]:
            place = slice(start, start + length)
            flagged, labels = part.tokens[place], part.labels[place] if part.labels.size else None
            documents.append(Document(flagged & _ID, flagged < 0, labels))
            start += length
        return documents

    def origin(self, index: int) -> str:
        """file:line of the example's row; reads the row again."""
        return self.row(index).origin

    def row(self, index: int) -> Row:
        """The row that the example was made of, read again."""
        return self._part(index).rows[int(self.rows[index])]

    def raw(self, index: int) -> dict:
        """The fields of that row as they are stored."""
        return self._part(index).rows.raw(int(self.rows[index]))

    def _part(self, index: int) -> Part:
        return self.parts[0 if self.part_ids is None else self.part_ids[index]]


def join(sets: Sequence[Examples]) -> Examples:
    """All examples of several sets, one after the other; the report is that of the first set."""
    if len(sets) == 1:
        return sets[0]
    first_part = np.cumsum([0, *(len(s.parts) for s in sets)])
    first_source = np.cumsum([0, *(len(s.weights) for s in sets)])
    part_ids = [k + (np.zeros(len(s), int) if s.part_ids is None else s.part_ids) for k, s in zip(first_part, sets)]
    names = ("starts", "lengths", "document_lengths", "rows")
    return Examples(
        parts=tuple(part for s in sets for part in s.parts),
        part_ids=np.concatenate(part_ids).astype(np.uint8),
        source_ids=np.concatenate([k + s.source_ids for k, s in zip(first_source, sets)]),
        weights=tuple(weight for s in sets for weight in s.weights),
        replayed=tuple(flag for s in sets for flag in s.replayed),
        digest=hashlib.sha256(" ".join(s.digest for s in sets).encode()).hexdigest(),
        report=sets[0].report,
        images=sets[0].images,
        pictures=np.concatenate([s.pictures for s in sets]) if sets[0].images else None,
        **{name: np.concatenate([getattr(s, name) for s in sets]) for name in names},
    )


class Columns(NamedTuple):
    """The arrays of COLUMNS, their `_content`, and what `build` returned (JSON)."""

    arrays: dict[str, np.ndarray]
    digest: str
    header: dict


# `build(append)` extends columns by `append(name, array)`, as often as it likes, and returns the header.
Append = Callable[[str, np.ndarray], None]
Build = Callable[[Append], dict]


def in_memory(build: Build) -> Columns:
    """What `build` appends, held in memory."""
    buffers = {name: io.BytesIO() for name in COLUMNS}
    header = build(_appender(buffers))
    arrays = {name: np.frombuffer(buffer.getbuffer(), COLUMNS[name]) for name, buffer in buffers.items()}
    return Columns(arrays, _content(_describe(arrays)), header)


def cached(directory: Path, key: str, build: Build) -> Columns:
    """Like `in_memory`, but mapped from `directory / key`, which is built first if it is absent or damaged.

    Raises:
      UserError: the directory cannot be written.
    """
    path = directory / key
    if path.exists():
        if (columns := _open(path)) is not None:
            return columns
        log.warning("%s is damaged; it is made again", path)
    with _oserror_as_user_error(directory):
        _sweep(directory)
    with _temporary_directory(path) as temporary:
        _write(temporary, build)
        with _oserror_as_user_error(directory):
            _replace(temporary, path)
    if (columns := _open(path)) is None:
        raise UserError(f"{path} does not read back as it was written; set FTJAX_CACHE to another directory")
    return columns


def _describe(arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    return {name: {"size": array.size, "sha256": _digest(array)} for name, array in arrays.items()}


def _digest(array: np.ndarray) -> str:
    """sha256 of the sha256 of each block, so that all cores share the work; about 1.5 GB/s on each."""
    content = memoryview(np.ascontiguousarray(array)).cast("B") if array.size else memoryview(b"")
    blocks = [content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda block: hashlib.sha256(block).digest(), blocks))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _content(described: dict[str, dict]) -> str:
    """sha256 (hex) of the tokens, the lengths and what is there of the optional columns."""
    names = ("tokens", "lengths", *(name for name in _OPTIONAL if described[name]["size"]))
    return hashlib.sha256(" ".join(described[name]["sha256"] for name in names).encode()).hexdigest()


def _appender(files: dict[str, BinaryIO]) -> Append:
    def append(name: str, array: np.ndarray) -> None:
        files[name].write(np.ascontiguousarray(array, COLUMNS[name]).data)

    return append


def _write(temporary: Path, build: Build) -> None:
    directory = temporary.parent
    with contextlib.ExitStack() as stack:
        with _oserror_as_user_error(directory):
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in COLUMNS}
        # Around each write, not around `build`, whose own errors have other causes. (It also works as a decorator.)
        header = build(_oserror_as_user_error(directory)(_appender(files)))
        with _oserror_as_user_error(directory):
            stack.close()  # which writes what is still buffered
            columns = _describe({name: _map(temporary, name) for name in COLUMNS})
            text = json.dumps({"columns": columns, "header": header})
            outer = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()})
            (temporary / "cache.json").write_text(f"{outer}\n{text}", encoding="utf-8")
            for file in temporary.iterdir():
                atomic.sync(file)


@contextlib.contextmanager
def _oserror_as_user_error(directory: Path) -> Iterator[None]:
    """UserError where the cache in `directory` cannot be written."""
    try:
        yield
    except OSError as error:
        what = error.strerror or error
        raise UserError(
            f"{directory}: tokenized data cannot be kept there ({what}); make room, or set FTJAX_CACHE to another "
            "directory"
        ) from error


def _open(path: Path) -> Columns | None:
    """The set cached at `path`; None if anything is not as it was written."""
    try:
        outer, text = (path / "cache.json").read_text(encoding="utf-8").split("\n")
        if json.loads(outer)["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        content = json.loads(text)
        arrays = {name: _map(path, name) for name in COLUMNS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    described = _describe(arrays)
    return Columns(arrays, _content(described), content["header"]) if described == content["columns"] else None


def _map(directory: Path, name: str) -> np.ndarray:
    path = directory / f"{name}.bin"
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, COLUMNS[name])
    return np.memmap(path, COLUMNS[name], "r").view(np.ndarray)


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """A directory next to `path`, locked while this process lives, and removed afterwards if it is still there."""
    temporary = atomic.beside(path)
    with _oserror_as_user_error(path.parent):
        temporary.mkdir()
    try:
        with open(temporary / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, path: Path) -> None:
    old = atomic.beside(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if not path.exists():  # else another run has just put the same set there
            raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Removes the temporary directories of killed runs."""
    for temporary in directory.glob("*.tmp-*"):
        try:
            with open(temporary / "lock", "rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(temporary, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):  # in use, or being made or removed at this moment
            continue
