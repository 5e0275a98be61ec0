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
        raise UserError(f"{path}: cannot be made ({error.strerror}); set FTJAX_CACHE to a place to write to") from error
    return path


def file(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """The file `name`, written once: `write` fills a temporary file beside it, which is then renamed.

    Several processes may ask for one name at a time: each writes its own, and the last one stays.

    Raises:
      UserError: the place is full or cannot be written to. What else `write` raises passes. Nothing remains of it.
    """
    path = directory(kind) / name
    if path.exists():
        return path
    try:
        with atomic.new_file(path) as temporary:
            write(temporary)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{path}: cannot be written ({what}); make room or set FTJAX_CACHE to another place") from error
    return path
