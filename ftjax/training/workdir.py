"""The run's directory: checks that it can be written, and that this run is its only writer."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ftjax import distributed
from ftjax.atomic import write_text
from ftjax.errors import TransientError, UserError

log = logging.getLogger(__name__)

_LOCK = ".lock"
_TOKEN = ".processes"  # the first of several processes writes it for the others to read
_LEASE_SECONDS = 150.0  # a network disk keeps the lock of a vanished host for about 90
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_SHARED_SECONDS = 20.0  # a network disk may show what another host wrote with a delay


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """`probe` and `lock` for a run. Of several processes the first one locks; all must see the same directory.

    Raises what `probe` and `lock` raise, and UserError where a host sees another directory under that name, or none.
    """
    with contextlib.ExitStack() as stack:
        token = None
        if distributed.is_first():
            probe(workdir)
            stack.enter_context(lock(workdir))
            token = secrets.token_hex(8)
            if distributed.count() > 1:
                write_text(workdir / _TOKEN, token)
        token = distributed.tell(token)
        if not distributed.is_first():
            _wait_for(workdir, token)
            probe(workdir)
        yield


def _wait_for(workdir: Path, token: str) -> None:
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if (workdir / _TOKEN).read_text() == token:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {workdir}: process {distributed.index()} does not see there what process 0 writes. All hosts "
                "need one directory: put --workdir on a disk that they share, under the same path"
            )
        time.sleep(0.2)


def probe(workdir: Path) -> None:
    """Create `workdir` and try in it what a save does: write, flush to the disk, rename, read back, remove.

    Raises UserError where one of these fails (read-only or full disk, a file in the way, missing rights).
    """
    # Two runs that start together, or two hosts of one run, must not share a probe file.
    file = workdir / f".probe-{distributed.index()}-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(file, "ftjax")
        read = file.read_text()
        file.unlink()
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written: {error.strerror or error}. Free or mount it writable, or choose "
            "another with --workdir."
        ) from error
    if read != "ftjax":
        raise UserError(f"workdir {workdir} does not read back what was written; choose another with --workdir.")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Lock `workdir` for this process; the kernel releases the lock when the process ends, however it ends.

    The lock file stays: removing it would let a third process lock a file that nobody else sees.

    If another machine holds the lock, or this one from before a restart, that host may be gone, and a network disk
    releases its lock only after a while. So this process waits for it.

    Raises:
      UserError: another run on this machine holds it (with its pid), or `workdir` cannot be written.
      TransientError: another machine still holds it after _LEASE_SECONDS.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / _LOCK, "a+", encoding="ascii")  # noqa: SIM115  (closed below, after the yield)
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be locked: {error.strerror or error}. Choose another with --workdir."
        ) from error
    with file:
        deadline = time.monotonic() + _LEASE_SECONDS
        while not _locked(file, workdir):
            file.seek(0)
            pid, _, machine = file.read().strip().partition(" ")
            message = (
                f"workdir {workdir} is in use by another run (pid {pid or 'unknown'}). Wait for it or end it, or "
                "choose another with --workdir."
            )
            if machine in ("", _machine()):
                raise UserError(message)
            if time.monotonic() > deadline:
                raise TransientError(message.replace(")", ", on another machine)", 1))
            time.sleep(2)
        file.truncate(0)
        file.write(f"{os.getpid()} {_machine()}")
        file.flush()
        yield


def _locked(file: TextIO, workdir: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; let only one run at a time use the directory", workdir)
    return True


def _machine() -> str:
    """An id of this machine since its last boot. The host name is no such id: a pod keeps it on another machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
