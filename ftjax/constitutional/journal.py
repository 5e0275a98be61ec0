"""A file of JSON lines that grows by blocks of rows, so that a command which was killed goes on with what is there."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftjax import atomic, strict_json
from ftjax.errors import UserError

SETTINGS = "settings.json"  # beside it: what its rows follow from


class Journal:
    """The rows of one output directory.

    Blocks are whole or not at all: what is computed together is computed together again, to the last bit.

    Attributes:
      rows: those that are there.
    """

    def __init__(self, path: Path, size: int, count: int):
        """Reads the file, or makes an empty one, and removes an unfinished block from its end.

        size: rows of a block. count: of all rows, the last block of which may be shorter.

        Raises:
          UserError: a line is damaged.
        """
        self._path = path
        path.touch()
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one is empty, or unfinished
        if len(lines) != count:
            lines = lines[: len(lines) - len(lines) % size]
        self.rows = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        os.truncate(path, sum(len(line) + 1 for line in lines))
        atomic.sync(path.parent)

    def add(self, rows: list[dict]) -> None:
        """Returns once the block is on the disk."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with self._path.open("ab") as file:
            size = file.tell()
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # such as a full disk: no part of a line may stay, to which the next would be added
                os.truncate(self._path, size)
                raise
        self.rows += rows


@contextmanager
def opened(out: Path, file: str, settings: dict[str, Any], size: int, count: int) -> Iterator[Journal]:
    """The journal `file` of the directory `out`, which is this process's alone until the block ends.

    settings: what the rows follow from, as JSON; recorded when the directory is new.

    Raises:
      UserError: another process has it, it holds rows of other settings, or what `Journal` raises.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a directory")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another ftjax.constitution is at work on it; wait, or name another"
            ) from None
        if (out / SETTINGS).exists():
            recorded = strict_json.loads((out / SETTINGS).read_text(encoding="utf-8"))
            if recorded != settings:
                other = next(key for key in {**recorded, **settings} if recorded.get(key) != settings.get(key))
                raise UserError(
                    f"--out {out}: holds rows of other settings: {other} was {recorded.get(other)!r} and is now "
                    f"{settings.get(other)!r}. Name another --out, remove this one, or give {other} as it was"
                )
        elif any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"--out {out}: holds other files; name a new directory")
        else:
            atomic.write_text(out / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        yield Journal(out / file, size, count)


def _parsed(line: bytes, where: str) -> dict:
    try:
        return strict_json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{where}: is no row ({error}); restore the file, or remove the line and all after it"
        ) from error
