"""Reading JSON that strangers wrote, staying inside a directory, making a new directory all or nothing."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ftjax.errors import UserError

# For configs, indexes and the headers of safetensors files. Parsed, JSON takes up to 25 times its size (the format of
# safetensors allows headers of 100 MB). The index of a model with 100,000 tensors has 10 MB.
MAX_JSON_BYTES = 32_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a UTF-8 file. UserError if it is absent, malformed, over 32 MB or repeats a key."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path}: larger than {MAX_JSON_BYTES} bytes, which no such file is; download it again"
            )
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; is {path.parent} the directory of a model or an adapter?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__} where an object is expected")
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of `json.loads`; ValueError for a repeated key (readers differ in what wins)."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, or UserError when `name` leads out of it by `..`, an absolute path or a symlink.

    In the cache of huggingface_hub the files of `REPO/snapshots/REVISION` are symlinks into `REPO/blobs`;
    these are followed, no others that leave the directory.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name.isprintable():
        raise UserError(
            f"{directory}: refers to {name!r}, outside the directory; files are named relative to it"
        )
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = (root / parts).resolve()
        target.exists()
    except (OSError, RuntimeError) as error:  # too long a name, symlinks in a circle
        raise UserError(f"{directory}: refers to {name!r}, which is not the name of a file ({error})") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{directory / name}: a symlink that leads out of the directory, to {target}; copy the file in"
        )
    return directory / name


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write into; synced and renamed to `out` when the block ends well.

    On an error nothing remains. Raises UserError when `out` exists and is anything but an empty directory.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty directory; name another place or remove it first")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error}); name a place that can be written") from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        os.replace(temporary, out)
        _sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
