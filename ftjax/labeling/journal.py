"""labels.jsonl: what people said of the pairs, one durable line after the other.

A judgement is {"pair", "labeler", "choice", "left", "seconds", "time"}: the choice is "a", "b" (the answer that was
preferred, by its name in the pair), "tie" or "skip"; left is "a" or "b", the answer that stood there; seconds since the
pair was shown; the time in UTC. {"pair", "labeler", "choice": "undo", "time"} takes the judgement before it back. Lines
are only appended, so the file is also the history of who changed what.
"""

import datetime
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ftjax import atomic, strict_json
from ftjax.errors import UserError

FILE = "labels.jsonl"
UNDO = "undo"


class Label(NamedTuple):
    """A judgement; see the module."""

    pair: str
    labeler: str
    choice: str
    left: str
    seconds: float
    time: str


Labels = dict[str, dict[str, Label]]  # pair id -> labeler -> judgement


class Journal:
    """The judgements of one labeling directory.

    Attributes:
      labels: those that stand.
      history: of each labeler the ids of the pairs judged, the last one last.
      dropped: the unfinished last line that a kill left, "" where there was none.
    """

    def __init__(self, path: Path, known: Sequence[str]):
        """Reads the file, or makes an empty one, and removes an unfinished last line from it.

        known: the ids of the pairs there are.

        Raises:
          UserError: a line is damaged, or about another pair.
        """
        self._path = path
        self.labels: Labels = {}
        self.history: dict[str, list[str]] = {}
        path.touch()
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        pairs = set(known)
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            self._take(_parsed(line, f"{path}:{number}", pairs))
        self.dropped = text[len(whole) :].decode(errors="replace")
        os.truncate(path, len(whole))
        atomic.sync(path.parent)

    def add(self, label: Label) -> None:
        """Returns once the judgement is on the disk."""
        self._append(label._asdict())

    def undo(self, labeler: str) -> str | None:
        """Takes the labeler's last judgement back; returns the id of its pair, None where there is none."""
        if not self.history.get(labeler):
            return None
        pair = self.history[labeler][-1]
        self._append({"pair": pair, "labeler": labeler, "choice": UNDO, "time": now()})
        return pair

    def _append(self, record: dict) -> None:
        with self._path.open("ab") as file:
            size = file.tell()
            try:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:  # such as a full disk: nothing of the line may stay, to which the next would be added
                os.truncate(self._path, size)
                raise
        self._take(record)

    def _take(self, record: dict) -> None:
        pair, labeler = record["pair"], record["labeler"]
        history = self.history.setdefault(labeler, [])
        if pair in history:
            history.remove(pair)
        if record["choice"] == UNDO:
            self.labels.get(pair, {}).pop(labeler, None)
        else:
            history.append(pair)
            self.labels.setdefault(pair, {})[labeler] = Label(**record)


@contextmanager
def opened(out: Path, known: Sequence[str]) -> Iterator[Journal]:
    """The journal of the labeling directory `out`, which is this process's alone until the block ends.

    Raises:
      UserError: another process has it, or what `Journal` raises.
    """
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another ftjax.label is at work on it; several people label at its page, or with another --out"
            ) from None
        yield Journal(out / FILE, known)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _parsed(line: bytes, where: str, known: set[str]) -> dict:
    try:
        record = strict_json.loads(line)
        choice = record["choice"]
        wanted = ("pair", "labeler", "choice", "time") if choice == UNDO else Label._fields
        if choice not in ("a", "b", "tie", "skip", UNDO) or set(record) != set(wanted):
            raise ValueError(f"the choice {choice!r} with {sorted(record)}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: is no judgement ({error}); restore the file, or remove the line") from error
    if record["pair"] not in known:
        raise UserError(
            f"{where}: is about the pair {record['pair']}, which candidates.jsonl beside it does not hold; "
            "restore that file, or name another --out"
        )
    return record
