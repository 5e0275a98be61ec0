"""Paths, globs and URLs of data files -> local files that can be read at any offset: fetched and unpacked if need be.

A file that is compressed or not on this machine is written once into the cache (`cache`), under a name made of its
path, size and time of change, and is read from there: rows are read in any order, which neither allows. So is a text
that starts with a byte order mark, as Windows' programs write it: its copy is UTF-8 without one.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import hashlib
import json
import lzma
import os
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ftjax import cache
from ftjax.errors import SourceError, UserError

# ending -> kind of file
FILE_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# What people have whose rows cannot be read, and what they do with it.
_OTHER_ENDINGS = {
    ".xlsx": "in Excel save it as 'CSV UTF-8'",
    ".xls": "in Excel save it as 'CSV UTF-8'",
    ".ods": "save it as CSV, in UTF-8",
    ".txt": "rename a table (Excel's 'Unicode Text') to .tsv, and put plain text into rows {\"text\": ...}",
}
# byte order mark -> encoding
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
BLOCK = 4 * 2**20
# Keys of fsspec's file information that change with the contents. A file that has none of them is fetched every time.
_STAMPS = {"mtime", "created", "updated", "LastModified", "last_modified", "ETag", "etag", "generation", "md5Hash"}


@dataclass(frozen=True)
class DataFile:
    """A file under the name that the user gave, and the local path from which it can be read.

    Attributes:
      name: path or URL, for messages.
      kind: a value of FILE_KINDS.
      path: local, not compressed.
    """

    name: str
    kind: str
    path: Path


class _Listed(NamedTuple):
    """A file that exists, not fetched and not unpacked yet."""

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]
    path: Path | None  # None: it is not on this machine
    stamp: str | None  # changes when the contents change; None: nothing is known that does


def resolve(source: str) -> list[DataFile]:
    """The files that a path, glob or URL (of any fsspec file system) names, sorted by name and ready to be read.

    Raises:
      UserError: none, a directory, an unknown ending, one that cannot be read, a package that is missing.
    """
    listed = _remote(source) if "://" in source else _local(source)
    endings = [_ending(file.name) for file in listed]
    found = []
    for file, (kind, compression) in zip(listed, endings, strict=True):
        path = _unpacked(file, compression) if compression or not file.path else file.path
        found.append(DataFile(file.name, kind, path if kind == "parquet" else _unmarked(file.name, path)))
    return found


def folder(name: str) -> str:
    """The absolute directory of a file, "" where it is not on this machine."""
    return "" if "://" in name else str(Path(name).absolute().parent)


def local_path(name: str) -> Path:
    """The local path of one file, which is fetched into the cache if it is not on this machine; never unpacked."""
    file = _remote(name)[0] if "://" in name else _local_file(name)
    return file.path or _unpacked(file, "")


def content(file: DataFile) -> Iterator[bytes]:
    """The bytes of a file in blocks of 4 MiB or less; SourceError where they cannot be read."""
    with _readable(file.name), open(file.path, "rb") as stream:
        yield from _blocks(stream, file.name)


def _blocks(stream: BinaryIO, name: str) -> Iterator[bytes]:
    with _readable(name):
        try:
            while block := stream.read(BLOCK):
                yield block
        except (EOFError, zlib.error, lzma.LZMAError, *_errors()) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise SourceError(f"{name}: cut off or damaged ({error}); copy or compress the file again") from error


class _Handle:
    """A file descriptor for `os.pread`, which any number of threads and forks may share; closed with the last user."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change (ns), so that a change during a run is noticed; SourceError where there is no file."""
    with _readable(str(path)):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


def identity(path: Path) -> list:
    """Cache key that changes when the file is replaced, even at equal size and time of change."""
    status = path.stat()
    return [os.fsdecode(path.resolve()), *stamp(path), status.st_ctime_ns, status.st_ino]


@lru_cache(maxsize=64)
def _handle(path: Path, expected: tuple[int, int]) -> _Handle:
    """`expected` is only part of the cache key: a file with another stamp gets a handle of its own."""
    return _Handle(path)


def read_part(path: Path, expected: tuple[int, int], start: int, stop: int) -> bytes:
    """Bytes start to stop of a file; SourceError if its `stamp` is not `expected`, that of its index."""
    with _readable(str(path)):
        handle = _handle(path, expected)
        part, status = os.pread(handle.descriptor, stop - start, start), os.fstat(handle.descriptor)
    if (status.st_size, status.st_mtime_ns) != expected:
        raise SourceError(f"{path}: was changed after this run began to read it; start again")
    return part


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """SourceError where the file called `name` cannot be read."""
    try:
        yield
    except _errors() as error:
        what = getattr(error, "strerror", None) or error
        raise SourceError(f"{name}: cannot be read ({what}); check the file and its permissions") from error


def _local(source: str) -> list[_Listed]:
    # A path that exists is itself, even where its name has brackets, stars or a tilde.
    path = source if os.path.exists(source) else os.path.expanduser(source)
    # A set, because a pattern with several ** may match a file more than once.
    paths = [path] if os.path.exists(path) else sorted(set(glob.glob(path, recursive=True)))
    if not paths:
        raise UserError(f"{source}: no such file; check the path or glob (relative to {Path.cwd()})")
    for path in paths:
        if Path(path).is_dir():
            raise UserError(
                f"{path}: is a directory; name the files, for example {path.rstrip('/')}/*.jsonl (hf:DIR for a saved "
                "Hugging Face data set, tfds:DIR for one of TFDS)"
            )
    return [_local_file(path) for path in paths]


def _local_file(path: str) -> _Listed:
    if not os.path.exists(path):
        path = os.path.expanduser(path)
    stamp(Path(path))  # SourceError where it is absent
    return _Listed(path, lambda: open(path, "rb"), Path(path), json.dumps(identity(Path(path))))


def _remote(source: str) -> list[_Listed]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = fsspec.core.url_to_fs(source)
    except ImportError as error:
        extra = "; pip install 'ftjax[gcs]'" if source.startswith(("gs://", "gcs://")) else ""
        raise UserError(f"{source}: needs a package that is not installed ({error}){extra}") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}; write file://, gs:// or another protocol that fsspec knows") from error
    if isinstance(system, LocalFileSystem):
        return _local(path)
    try:
        try:
            infos = {path: system.info(path)}  # not isfile, which takes a lost connection for a missing file
        except FileNotFoundError:
            # One call for each file: a listing may hold fewer keys, and the file would be cached under another name.
            infos = {path: system.info(path) for path in system.glob(path)} if glob.has_magic(path) else {}
    except _errors() as error:
        raise UserError(f"{source}: cannot be listed ({error}); check the URL, your access and the network") from error
    if not infos:
        raise UserError(f"{source}: no such file; check the URL or glob, and your access to it")
    if directory := next((path for path, info in infos.items() if info["type"] == "directory"), None):
        name = system.unstrip_protocol(directory).rstrip("/")
        raise UserError(f"{name}: is a directory; name the files, for example {name}/*.jsonl")
    return [_remote_file(system, path, infos[path]) for path in sorted(infos)]


def _errors() -> tuple[type[Exception], ...]:
    """What reading may raise: OSError, ValueError (Arrow), and the errors of the file systems that are in use."""
    names = {"aiohttp": "ClientError", "gcsfs.retry": "HttpError", "google.auth.exceptions": "GoogleAuthError"}
    imported = {name: sys.modules[name] for name in names if name in sys.modules}
    return (OSError, ValueError, *(getattr(module, names[name]) for name, module in imported.items()))


def _remote_file(system, path: str, info: dict) -> _Listed:
    name = system.unstrip_protocol(path)
    facts = {key: info[key] for key in sorted({"size", *_STAMPS} & info.keys()) if info[key] is not None}
    stamped = facts.keys() & _STAMPS  # the size alone does not show a change
    stamp = json.dumps([name, [f"{key}={value}" for key, value in facts.items()]]) if stamped else None
    return _Listed(name, lambda: system.open(path, "rb"), None, stamp)


def _ending(name: str) -> tuple[str, str]:
    """The kind of a file and its compression ("" for none), by its name."""
    path = Path(name.lower())
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = FILE_KINDS.get(Path(path.stem).suffix if compression else path.suffix)
    if kind is None:
        known = ", ".join(FILE_KINDS)
        advice = _OTHER_ENDINGS.get(path.suffix)
        raise UserError(
            f"{name}: unknown ending; rows are read from {known}, each also with {', '.join(COMPRESSIONS)}"
            + (f"; {advice}" if advice else "")
        )
    return kind, compression


def _unpacked(file: _Listed, compression: str) -> Path:
    def write(path: Path) -> None:
        with _readable(file.name):
            opened = file.open()
        with opened as packed, _decompress(packed, compression) as plain, open(path, "wb") as out:
            out.writelines(_blocks(plain, file.name))

    key = hashlib.blake2b((file.stamp or f"{file.name} {uuid.uuid4()}").encode(), digest_size=16).hexdigest()
    return cache.file("files", key, write)


def _unmarked(name: str, path: Path) -> Path:
    """Where the text of a file is in UTF-8 without a byte order mark: there, or in a copy in the cache."""
    with _readable(name), open(path, "rb") as text:
        start = text.read(max(map(len, _MARKS)))
    mark = next((mark for mark in _MARKS if start.startswith(mark)), None)
    if b"\0" in start[:2]:
        raise UserError(f"{name}:1: looks like UTF-16 without a byte order mark; save it as UTF-8")
    if mark is None:
        return path

    def write(copy: Path) -> None:
        with _readable(name):
            marked = open(path, "rb")  # noqa: SIM115  (closed below)
        with marked, open(copy, "wb") as out:
            marked.seek(len(mark))
            blocks = _blocks(marked, name)
            out.writelines(blocks if mark == codecs.BOM_UTF8 else _recoded(blocks, _MARKS[mark], name))

    key = hashlib.blake2b(f"unmarked {json.dumps(identity(path))}".encode(), digest_size=16).hexdigest()
    return cache.file("files", key, write)


def _recoded(blocks: Iterator[bytes], encoding: str, name: str) -> Iterator[bytes]:
    """The text of the blocks in UTF-8."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    try:
        for block in blocks:
            text = decoder.decode(block)
            line += text.count("\n")
            yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}:{line}: the file starts with the mark of {encoding}, but is not, from about this line on "
            f"({error.reason}); save it as UTF-8"
        ) from None


def _decompress(file: BinaryIO, compression: str) -> AbstractContextManager[BinaryIO]:
    if compression == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    if compression == ".gz":
        return gzip.open(file)
    start = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}.get(compression)
    return contextlib.nullcontext(file if start is None else _Streams(file, start))


class _Streams:
    """The contents of bzip2 or xz streams, one after the other, perhaps with zeros between them (padding of xz).

    `bz2.open` and `lzma.open` take damage after the first stream for the end of the file, and so lose rows silently.
    """

    def __init__(self, file: BinaryIO, start: Callable):
        self._file, self._start, self._stream = file, start, start()

    def read(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data
                while not (packed := packed.lstrip(b"\0")):
                    if not (packed := self._file.read(BLOCK)):
                        return b""
                self._stream = self._start()
            elif self._stream.needs_input and not (packed := self._file.read(BLOCK)):
                raise EOFError("it ends within the compressed data")
            if plain := self._stream.decompress(packed, size):
                return plain
