"""Files that can be made again: downloads and what was unpacked, under $FTJAX_CACHE (else ~/.cache/ftjax)."""

import os
from collections.abc import Callable
from pathlib import Path

from ftjax import atomic
from ftjax.errors import UserError


def directory(kind: str) -> Path:
    """The directory for one kind of file, made where it is missing. It may be removed whenever no run uses it.

    Raises:
      UserError: it cannot be made.
    """
    path = Path(os.environ.get("FTJAX_CACHE") or Path.home() / ".cache" / "ftjax") / kind
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); set FTJAX_CACHE to another directory") from error
    return path


def file(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """The path of the file `name`, written once: `write` fills a temporary file beside it, which is then renamed.

    Several processes may write one name at the same time: each renames its own file, and the last one stays.

    Raises:
      UserError: the disk is full or cannot be written to. Other errors of `write` pass. Nothing remains of it.
    """
    path = directory(kind) / name
    if path.exists():
        return path
    try:
        with atomic.new_file(path) as temporary:
            write(temporary)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{path}: cannot be written ({what}); make room or set FTJAX_CACHE to another disk") from error
    return path
