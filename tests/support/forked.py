"""`python -m MODULE ...` as a process that is forked where its imports are already made.

A command imports for more than two seconds of a core before it does anything, and the tests start it a hundred times.
Each process that runs tests has one server, which has imported what the commands do and started no thread and no
backend of JAX; a command is a fork of it, with its own environment, arguments, output and signals.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

COMMANDS = ("train", "sweep", "evaluate", "generate", "score", "export", "inspect_data", "plan")
MODULES = tuple(f"ftjax.{name}" for name in COMMANDS)
# A command whose environment has others of these is started anew.
READ_WHEN_IMPORTED = ("JAX_", "HF_", "OMP_", "PYTHON")

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*MODULES, __name__])
_served: dict[str, str] = {}  # the environment that the server was started with


def fits(arguments: Sequence[str], environment: dict[str, str]) -> bool:
    """Whether a fork of the server is what a process of its own would be."""
    if not _served:
        _served.update(environment)
        before = dict(os.environ)
        os.environ.update(environment)
        forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(before)
    changed = [name for name in environment | _served if environment.get(name) != _served.get(name)]
    return arguments[0] in MODULES and not any(name.startswith(READ_WHEN_IMPORTED) for name in changed)


class Forked:
    """What `subprocess.Popen` is of a process, as far as tests use it; its output goes to files."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]):
        self._directory = Path(tempfile.mkdtemp(prefix="forked-"))
        (self._directory / "out").touch()
        (self._directory / "err").touch()
        self._process = _SERVER.Process(target=_run, args=(tuple(arguments), environment, os.getcwd(), self._directory))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), once it has ended; the second time both are empty."""
        self.wait(timeout)
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / "out").read_text(), (self._directory / "err").read_text()
        return "", ""

    def __del__(self):
        shutil.rmtree(self._directory, ignore_errors=True)


def _run(arguments: Sequence[str], environment: dict[str, str], directory: str, output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    os.setsid()  # as little of the server's terminal as of its imports
    for number, name in ((1, "out"), (2, "err")):
        with (output / name).open("ab") as file:
            os.dup2(file.fileno(), number)
    sys.argv = list(arguments)
    sys.modules.pop(arguments[0], None)  # runpy makes it anew, as __main__
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
