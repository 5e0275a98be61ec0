"""Rows of TensorFlow Datasets, read through `tfds.data_source`: random access to array_record files, no tensorflow."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ftjax.errors import UserError


def records(source: str, split: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Origins ("tfds:name[3]") and functions that read the row as plain strings, numbers, lists and dicts.

    Args:
      source: `tfds:NAME`, `tfds:NAME:/data_dir`, or `tfds:DIR` where DIR is a prepared data set: the directory that
        holds its dataset_info.json. The data must be (or be prepared) in the array_record format.
      split: a split or a slice of one, "train[:1%]".

    Raises:
      UserError: no such data set, split or directory, or data in another format.
    """
    data = _open(source, split)
    for i in range(len(data)):
        yield f"{source}[{i}]", lambda i=i: _plain(data[i])


def _open(source: str, split: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{source}: needs tensorflow-datasets and array_record; pip install them ({error})") from error

    name, _, data_dir = source.removeprefix("tfds:").partition(":")
    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name).as_data_source(split=split)
        return tfds.data_source(name, split=split, data_dir=data_dir or None)
    # What tfds raises for an unknown name or split; an unprepared, unreadable or non-array_record directory; a data set
    # whose preparation needs a package or the network that is not there.
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source}: tfds cannot open the split {split!r}: {lines[0]} Check the name and the split, and prepare "
            "the data with file_format='array_record'; then name it as tfds:NAME, tfds:NAME:/data_dir or tfds:DIR, "
            "where DIR holds dataset_info.json"
        ) from error


def _plain(value: object):
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # perhaps an image in a field that is not used; `rows` refuses bytes where it wants a string
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _plain(item) for key, item in value.items()}
        # tfds stores a list of messages as one object of lists; turn it back.
        if isinstance(plain.get("role"), list) and all(isinstance(item, list) for item in plain.values()):
            return [dict(zip(plain, items, strict=True)) for items in zip(*plain.values(), strict=True)]
        return plain
    return value
