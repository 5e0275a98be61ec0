"""What runs commands for the queue: one small interface, and processes of this machine."""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol


class Task(NamedTuple):
    """A command that a backend runs: `python *arguments`.

    name: it has no other, and it is one that SLURM and Kubernetes take. folder: for its output and its marks.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path

    def log(self) -> str:
        """What it printed so far, the last of it where that is much."""
        file = self.folder / "log"
        if not file.is_file():
            return ""
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 100_000))
            return stream.read().decode(errors="replace")


class State(Enum):
    """RUNNING: or it will, once there is room. UNKNOWN: who knows does not answer; ask later."""

    RUNNING = "running"
    ENDED = "ended"
    ABSENT = "absent"
    UNKNOWN = "unknown"


class Found(NamedTuple):
    """How it is with a task. status: that it ended with; a task that was lost with its machine is absent."""

    state: State
    status: int | None = None


class Backend(Protocol):
    """Starts tasks, finds those that it, or an earlier server, started, and ends them.

    Nothing is kept in the server: it may be killed between any two calls. A task that runs is never started again.
    """

    def start(self, task: Task) -> None:
        """Starts it anew, unless it runs. UserError where that cannot be."""
        ...

    def poll(self, task: Task) -> Found: ...

    def stop(self, task: Task) -> bool:
        """Asks it to save and end; whether it could be asked, as it cannot in its first moment."""
        ...

    def kill(self, task: Task) -> None:
        """Ends it at once."""
        ...


# The shell and what it starts hold the lock as descriptor 9, and the kernel releases it when both are gone, however
# they went. So a lock that is free and no status mean that the task was lost.
_SCRIPT = """
folder=$1; shift
"$@" &
echo $! >"$folder/pid"
wait $!
echo $? >"$folder/status.new"
mv "$folder/status.new" "$folder/status"
"""
_LOCK_DESCRIPTOR = 9


class Local:
    """Processes of this machine, in sessions of their own: they outlive the server, and another one finds them.

    environment: variables for them, beside the server's own.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, python: Sequence[str] = (sys.executable,)):
        self._environment, self._python = dict(environment or {}), tuple(python)
        self._children: set[int] = set()  # to be reaped

    def start(self, task: Task) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        with _lock(task.folder) as lock:
            if lock is None:
                return
            for name in ("status", "pid"):
                (task.folder / name).unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(task.folder / "log"), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, lock, _LOCK_DESCRIPTOR),
            ]
            command = ["sh", "-c", _SCRIPT, "ftjax", str(task.folder), *self._python, *task.arguments]
            environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self._environment
            self._children.add(os.posix_spawn("/bin/sh", command, environment, file_actions=actions, setsid=True))

    def poll(self, task: Task) -> Found:
        self._reap()
        with _lock(task.folder) as lock:
            if lock is None:
                return Found(State.RUNNING)
            status = _number(task.folder / "status")
            return Found(State.ABSENT) if status is None else Found(State.ENDED, status)

    def stop(self, task: Task) -> bool:
        return self._signal(task, signal.SIGTERM)

    def kill(self, task: Task) -> None:
        self._signal(task, signal.SIGKILL)

    def _signal(self, task: Task, number: signal.Signals) -> bool:
        with _lock(task.folder) as lock:
            pid = _number(task.folder / "pid")
            if lock is None and pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    return True
        return False

    def _reap(self) -> None:
        for pid in list(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            self._children.discard(pid)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """A descriptor that holds the lock of a task; None where another process holds it."""
    if not folder.is_dir():
        yield -1
        return
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
