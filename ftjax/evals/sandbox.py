"""Python code that a model wrote, run apart: in a process with limits, without files to write to and without network.

`run` keeps mistakes from doing harm: an endless loop, a full memory, a deleted directory. It is no security boundary:
code that means harm can undo the guards within Python, and may read whatever the user may read. Where that matters, run
the whole evaluation in a container or a virtual machine. `call` is for code of strangers: the kernel keeps it from
other files (Landlock), from the network and from other processes (namespaces), and where it cannot, nothing is run.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

CPU_SECONDS, WALL_SECONDS = 5, 10
MEMORY_BYTES, FILE_BYTES = 1 << 30, 1 << 20

_CHILD = Path(__file__).with_name("sandbox_child.py")
_GRACE_SECONDS = 5  # the process ends itself at WALL_SECONDS
# Namespaces without network, and of processes, all of which end with the first.
_UNSHARE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--"]


def run(code: str, wall_seconds: int = WALL_SECONDS) -> str:
    """Runs a Python program; "" where it came to its end, else why it did not, such as "AssertionError: ".

    It has the standard library only, an empty environment, and a temporary directory that is its working directory.

    Raises:
      UserError: the process could not be started, which is never the code's failure.
    """
    token = secrets.token_hex(16)  # that the program ended is told with it, so that an early exit is not taken for it
    outcome = _outcome(code, token, wall_seconds)
    return "" if outcome == token else outcome or "ended early"


def call(code: str, function: str, arguments: Sequence[Any], wall_seconds: int = WALL_SECONDS) -> tuple[float, str]:
    """(what a function of a Python program returns for JSON, "") or (NaN, why it returns no number).

    As `run`, and the kernel keeps it from files that are neither its own nor Python's.

    Raises:
      UserError: the kernel cannot, or the process could not be started.
    """
    if not _namespaces():
        raise UserError("code of others is only run apart from the network, for which this system lacks `unshare`")
    token = secrets.token_hex(16)
    outcome = _outcome(code, token, wall_seconds, [function, list(arguments)])
    if outcome.startswith(f"{token} "):
        raise UserError(f"code of others is only run apart from other files, and {outcome.removeprefix(token).strip()}")
    if not outcome.startswith(token):
        return math.nan, outcome or "ended early"
    return float(outcome.removeprefix(token)), ""


def _outcome(code: str, token: str, seconds: int, call: list[Any] | None = None) -> str:
    """What the process tells at its end; call: [name of a function, its arguments], of code that is confined."""
    with tempfile.TemporaryDirectory(prefix="ftjax-") as directory:
        limits = {"CPU": CPU_SECONDS, "AS": MEMORY_BYTES, "FSIZE": FILE_BYTES, "NOFILE": 64, "NPROC": 0, "CORE": 0}
        job = {"code": code, "token": token, "directory": directory, "seconds": seconds, "limits": limits}
        job |= {"call": call, "confined": call is not None}
        # -I -S: nothing but the standard library, whatever the environment and the working directory hold.
        process = subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", "-S", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={"TMPDIR": directory},
            start_new_session=True,
        )
        try:
            told, trouble = process.communicate(json.dumps(job).encode(), seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            told, trouble = b"ready\n", b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of the group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()
    ready, _, outcome = told.decode(errors="replace").partition("\n")
    if ready != "ready":
        raise UserError(f"the process that is to run a model's code did not start: {trouble.decode(errors='replace')}")
    return outcome


@functools.cache
def check() -> None:
    """UserError where code cannot be run here."""
    if reason := run("assert 1 + 1 == 2"):
        raise UserError(f"a model's code cannot be run here: a program that must pass did not: {reason}")


@functools.cache
def _namespaces() -> list[str]:
    """The beginning of a command that gives it namespaces of its own; [] where this user may not make any."""
    if not shutil.which("unshare"):
        return []
    tried = subprocess.run([*_UNSHARE, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False)
    return _UNSHARE if tried.returncode == 0 else []
