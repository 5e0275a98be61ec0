"""Files that can be made again: downloads, what was unpacked or computed, under $FTJAX_CACHE (else ~/.cache/ftjax)."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ftjax import atomic
from ftjax.errors import UserError

log = logging.getLogger(__name__)


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
    if not path.exists():
        _write(path, write)
    return path


def read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The float32 array that `write_array` wrote; None where there is none, or, with a warning, a damaged one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    values, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(values).digest() != digest or len(values) != 4 * np.prod(shape, dtype=int):
        log.warning("%s is damaged; it is made again", path)
        return None
    return np.frombuffer(values, "<f4").reshape(shape)


def write_array(path: Path, values: np.ndarray) -> None:
    """Replaces the file by one that holds float32 values, in any shape, and their sha256 at its end.

    Raises:
      UserError: as `file`.
    """
    content = np.ascontiguousarray(values, "<f4").tobytes()
    _write(path, lambda temporary: temporary.write_bytes(content + hashlib.sha256(content).digest()))


_DIGEST = 32  # bytes


def _write(path: Path, write: Callable[[Path], None]) -> None:
    try:
        with atomic.new_file(path) as temporary:
            write(temporary)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{path}: cannot be written ({what}); make room or set FTJAX_CACHE to another disk") from error
