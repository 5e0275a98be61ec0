"""Files and directories that appear whole or not at all: written beside their place, synced, renamed.

A kill at any moment, or a power cut, leaves under the name what was there before or all of the new. What was written
beside it may stay, hidden, under a name that ends in `.tmp-` and something random.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftjax.errors import TransientError, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def beside(path: Path) -> Path:
    """A name of its own next to `path`, on the same file system, that nobody reads: `.NAME.tmp-...`."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The name of a file to write, which replaces `path` when the block ends well; after an error nothing remains.

    A symlink stays, and the file that it leads to is replaced. What is no file (/dev/stdout, a pipe) is written to.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    temporary = beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by one that holds `text` in UTF-8."""
    try:
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:  # which names the hidden file
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file by JSON Lines, as of `json.dumps`, with all letters as they are."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, which becomes `out` when the block ends well; after an error nothing remains.

    Raises:
      UserError: `out` exists and is anything but an empty directory, or its place cannot be written.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty directory; name another place or remove it first")
    temporary = beside(out)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error}); name a place that can be written") from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        os.replace(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def room_for(out: Path, nbytes: int) -> Iterator[None]:
    """TransientError that names `out`, its size and what is free, where the disk has no room for it.

    Before the block where that is known, and after a write in it that failed for want of room (of a quota, too).
    """
    out = Path(out).resolve()
    disk = next(place for place in (out, *out.parents) if place.is_dir())

    def refusal(why: str) -> TransientError:
        free = shutil.disk_usage(disk).free
        return TransientError(
            f"{out}: {why}. It needs {size(nbytes)}, and {size(free)} are free on the disk of {disk}; free some, or "
            "name a place on another disk"
        )

    if shutil.disk_usage(disk).free < nbytes:
        raise refusal("there is no room for it")
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise refusal(f"it could not be written ({error.strerror})") from error


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"


def sync(path: Path) -> None:
    """Flushes a file or a directory to the disk; a directory only where the disk can do that, as not all can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
