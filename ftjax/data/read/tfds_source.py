"""Rows of TensorFlow Datasets, by random access and without tensorflow: array_record through tfds, TFRecord here.

A TFRecord file is a sequence of records, each after its length, and tfds writes the same `tf.train.Example` into them
as into array_record files: an index of the lengths and the parser of tfds are all that is needed.
"""

import contextlib
import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ftjax.data.read import columns, files
from ftjax.data.read.columns import NONE, Columns
from ftjax.data.read.files import DataFile
from ftjax.data.read.plain import plain_row
from ftjax.data.read.rows import Numbered, locate
from ftjax.errors import SourceError, UserError


class Tfds(Numbered):
    """The rows of one whole split as plain values. `Records` of `rows`.

    A data set that is not prepared yet is prepared in array_record files. A split may also be "all" or a sum of
    several, "train+test".

    Raises:
      UserError: no such data set, split or directory, data in another format, a package that is missing.
    """

    def __init__(self, source: str, split: str, names: Columns = NONE):
        super().__init__(source, len(_open(source, split, os.getpid())[0]))
        self._split, self._columns = split, names
        if not len(self):
            raise UserError(f"{source}: no rows (split {split!r}); name a split that has some")
        columns.check(names, _builder(source, split).info.features, source)

    def __getitem__(self, i: int) -> dict:
        records, parse = _open(self._name, self._split, os.getpid())
        return plain_row(parse(records[i], self.origin(i)), self._columns)

    def digest(self) -> str:
        """Of the files that hold the split, and of which of their records it is."""
        digest = hashlib.sha256()
        for part in _parts(_builder(self._name, self._split), self._split):
            digest.update(f"{part.skip} {part.take} ".encode())
            file = DataFile(part.filename, "", files.local_path(part.filename))
            for block in files.content(file):
                digest.update(block)
        return digest.hexdigest()


@lru_cache(maxsize=16)
def _open(source: str, split: str, process: int) -> tuple[Sequence, Callable[[object, str], dict]]:
    """The records of a split, and a function (record, origin) -> fields.

    `process` is only part of the cache key: array_record readers do not survive a fork.
    """
    builder = _builder(source, split)
    with _explained(source, split):
        if builder.info.file_format is not None and builder.info.file_format.value == "tfrecord":
            records = TfRecords([(part.filename, part.skip, part.take) for part in _parts(builder, split)])
            return records, partial(_parse, builder.info.features)
        return builder.as_data_source(split=split), lambda row, origin: row


@lru_cache(maxsize=16)
def _builder(source: str, split: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{source}: needs tensorflow-datasets and array_record; pip install them ({error})") from error

    rest = source.removeprefix("tfds:")
    name, _, data_dir = rest.partition(":")
    with _explained(source, split):
        if data_dir.startswith("//"):  # the name is a URL
            return tfds.builder_from_directory(rest)
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, data_dir=data_dir or None)
        if not builder.is_prepared():
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
            builder.download_and_prepare()
        return builder


def _parts(builder, split: str) -> list:
    """The files of a split, each with its `filename` and how many records to `skip` and to `take`."""
    return builder.info.splits[split].file_instructions


@contextlib.contextmanager
def _explained(source: str, split: str) -> Iterator[None]:
    try:
        yield
    # tfds raises these for an unknown name or split, for an unprepared, unreadable or unknown directory, and for a data
    # set whose preparation needs a package that is missing, or the network.
    except (ValueError, KeyError, OSError, RuntimeError, AssertionError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        lacks_tensorflow = "tensorflow" in lines[0].lower() and isinstance(error, ImportError)
        extra = "Install tensorflow, which only this needs: pip install 'ftjax[tfds-tf]'. " if lacks_tensorflow else ""
        raise SourceError(
            f"{source}: tfds cannot open the split {split!r}: {lines[0]} {extra}Check the name and the split, and "
            "prepare the data with file_format='array_record'; then name it as tfds:NAME, tfds:NAME:/data_dir or "
            "tfds:DIR, where DIR holds dataset_info.json"
        ) from error


def _parse(features, record: bytes, origin: str) -> dict:
    from google.protobuf.message import DecodeError

    try:
        return features.deserialize_example_np(record)
    except (DecodeError, ValueError, KeyError) as error:
        raise UserError(f"{origin}: not a record of this data set ({error}); prepare it again") from error


class TfRecords(Sequence[bytes]):
    """The records of TFRecord files by their index.

    The format: uint64 length, its CRC, the record, its CRC (little endian). The lengths must lead exactly to the end of
    the file; the CRCs are not checked.
    """

    def __init__(self, parts: Sequence[tuple[str, int, int]]):
        """parts: the file, how many records to skip and how many to take."""
        self._files = []
        for name, skip, take in parts:
            path = files.local_path(name)
            starts = _record_starts(path, name)
            if skip + take > len(starts) - 1:
                raise SourceError(
                    f"{name}: holds {len(starts) - 1} records, not {skip + take}; prepare the data set again"
                )
            self._files.append((path, files.stamp(path), starts[skip : skip + take + 1]))
        self._ends = np.cumsum([len(starts) - 1 for _, _, starts in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> bytes:
        number, i = locate(self._ends, i)
        path, stamp, starts = self._files[number]
        return files.read_part(path, stamp, int(starts[i]) + 12, int(starts[i + 1]) - 4)


def _record_starts(path: Path, name: str) -> np.ndarray:
    """int64 [n + 1]: the offset at which each record starts with its length, and the end of the file."""
    starts, position = array("q"), 0
    size = path.stat().st_size
    if size == 0:
        return np.zeros(1, np.int64)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while position + 16 <= size:
            starts.append(position)
            position += 16 + struct.unpack_from("<Q", data, position)[0]
    if position != size:
        raise SourceError(f"{name}: not a TFRecord file, cut off or damaged; prepare or copy the data set again")
    starts.append(position)
    return np.frombuffer(starts, np.int64)
