"""Parquet files: written once into the cache as uncompressed Arrow, of which any row can be read without the others.

A row group can hold a million rows, and Parquet only gives it whole. The Arrow file is mapped into memory, so all
processes on a machine share the pages that they read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ftjax import cache
from ftjax.data.read import columns, files
from ftjax.data.read.columns import NONE, Columns
from ftjax.data.read.files import DataFile
from ftjax.data.read.plain import plain_row
from ftjax.data.read.rows import Numbered, locate
from ftjax.errors import SourceError, UserError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 4096
_DIGEST = b"ftjax.digest"  # key of the schema's metadata in the cached file


class Parquet(Numbered):
    """The rows of a Parquet file. `Records` of `rows`."""

    def __init__(self, file: DataFile, names: Columns = NONE):
        key = hashlib.sha256(json.dumps(files.identity(file.path)).encode()).hexdigest()[:32]
        self._path = cache.file("tables", f"{key}.arrow", lambda path: _convert(file, path))
        self._stamp = files.stamp(self._path)
        batches = _batches(self._path, self._stamp)
        if not sum(len(batch) for batch in batches):
            raise UserError(f"{file.name}: the file has no rows; fill it or leave it out")
        present = batches[0].schema.names
        if repeated := next((name for name in present if present.count(name) > 1), None):
            raise UserError(f"{file.name}: two columns are called {repeated!r}; name each once")
        columns.check(names, present, file.name)
        self._columns = names
        self._ends = np.cumsum([len(batch) for batch in batches])
        super().__init__(file.name, int(self._ends[-1]), files.folder(file.name))
        self._digest = batches[0].schema.metadata[_DIGEST].decode()

    def __getitem__(self, i: int) -> dict:
        number, local = locate(self._ends, i)
        batch = _batches(self._path, self._stamp)[number]
        try:
            row = batch.slice(local, 1).to_pylist()[0]
        except ValueError as error:  # a string column that is not UTF-8, among others
            raise UserError(f"{self.origin(i)}: cannot be read ({error}); write the row again") from error
        return plain_row(row, self._columns)

    def digest(self) -> str:
        return self._digest


@lru_cache(maxsize=64)
def _batches(path: Path, expected: tuple[int, int]) -> list["pyarrow.RecordBatch"]:
    """The batches of an Arrow file, mapped and not yet read; any number of threads may read their rows."""
    import pyarrow

    if files.stamp(path) != expected:
        raise SourceError(f"{path}: was changed after this run began to read it; start again")
    try:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (ValueError, OSError) as error:
        raise SourceError(f"{path}: this file of the cache is damaged ({error}); remove it and start again") from error


def _convert(file: DataFile, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    digest = hashlib.sha256()
    for block in files.content(file):
        digest.update(block)
    with _damage_as_user_error(file):
        # With a buffer and without pre_buffer, or a whole row group is read before its first batch.
        source = pyarrow.OSFile(os.fsencode(file.path))  # as bytes: a name need not be UTF-8
        parquet = pyarrow.parquet.ParquetFile(source, buffer_size=2**20, pre_buffer=False)
        schema = parquet.schema_arrow.with_metadata({_DIGEST: digest.hexdigest().encode()})
    with pyarrow.OSFile(str(path), "wb") as out, pyarrow.ipc.new_file(out, schema) as writer, source:
        batches = parquet.iter_batches(BATCH_ROWS)
        while True:
            with _damage_as_user_error(file):
                batch = next(batches, None)
            if batch is None:
                return
            writer.write_batch(pyarrow.RecordBatch.from_arrays(batch.columns, schema=schema))


@contextlib.contextmanager
def _damage_as_user_error(file: DataFile) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file.name}: not a readable Parquet file ({what}); write or copy it again") from error
