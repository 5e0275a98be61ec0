"""Rows of Hugging Face data sets: from the hub, from a directory of data files, or saved by `save_to_disk`."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from ftjax.data.read import columns, files
from ftjax.data.read.columns import NONE, Columns
from ftjax.data.read.files import DataFile
from ftjax.data.read.plain import plain_row
from ftjax.data.read.rows import Numbered
from ftjax.errors import SourceError, UserError


class HuggingFace(Numbered):
    """The rows of one whole split as plain values. `Records` of `rows`.

    `hf:DIR` is what `save_to_disk` wrote, or a directory of Parquet, JSON or CSV files. The code of a data set is never
    run: those that consist of a script are refused. A split may be a sum of several, "train+validation".

    Raises:
      UserError: no such data set, config or split; no connection; the package `datasets` is missing.
    """

    def __init__(self, source: str, split: str, names: Columns = NONE):
        name = source.removeprefix("hf:")
        folder = os.path.abspath(name) if os.path.isdir(name) else ""
        super().__init__(source, len(_open(source, split)), folder)
        self._split, self._columns = split, names
        columns.check(names, _open(source, split).column_names, source)
        if not len(self):
            raise UserError(f"{source}: no rows (split {split!r}); name a split that has some")

    def __getitem__(self, i: int) -> dict:
        # The raw values of the table: images and sound stay bytes, and no package is needed to decode them.
        return plain_row(_open(self._name, self._split)[i].to_pylist()[0], self._columns)

    def digest(self) -> str:
        """Of the tables that hold the split and of its length and columns."""
        data = _open(self._name, self._split)
        digest = hashlib.sha256(f"{len(data)} {data.column_names}".encode())
        for cached in data.cache_files:
            file = DataFile(cached["filename"], "", Path(cached["filename"]))
            for block in files.content(file):
                digest.update(block)
        return digest.hexdigest()


@lru_cache(maxsize=16)
def _open(source: str, split: str):
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: needs the package datasets; pip install 'ftjax[hf]' ({error})") from error

    rest = source.removeprefix("hf:")
    name, _, config = (rest, "", "") if os.path.isdir(rest) else rest.partition(":")
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # as save_to_disk writes
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise UserError(f"{source}: has the splits {', '.join(data)}, not {split!r}; name one of them")
                data = data[split]
            elif split != "train":
                raise UserError(f"{source}: was saved as one data set without splits; leave out {split!r}")
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    # What datasets raises for an unknown name, config or split, for scripts, without a connection, for damaged files.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"{source}: datasets cannot open the split {split!r}: {lines[0]} Check the name (hf:NAME, "
            "hf:NAME:CONFIG or hf:DIR), the split and the connection to the hub (HF_HUB_OFFLINE; HF_TOKEN for what "
            "needs a login); a data set that was downloaded before is read without a connection"
        ) from error
    return data.with_format("arrow")
