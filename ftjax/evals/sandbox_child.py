"""What `sandbox.run` starts: reads a job from stdin, runs its code within limits, and says on stdout how it ended.

Runs under `python -I -S`, so it imports the standard library only.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable

_REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system"),
    *("os.kill", "signal.pthread_kill"),
)
# Events of `sys.addaudithook`, and how many of their first arguments are paths that are changed.
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"), 1),
    **dict.fromkeys(("os.setxattr", "os.removexattr", "os.chflags", "shutil.rmtree", "shutil.chown"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.write(answer, b"ready\n")
    # In a child: the first process of a namespace is spared by the signals that enforce the limits.
    child = os.fork()
    if child == 0:
        _work(job, answer)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        limits = {"SIGALRM": f"more than {job['seconds']} s", "SIGXCPU": "more processor time than it may use"}
        os.write(answer, limits.get(name, f"ended by {name}").encode())
    os._exit(0)


def _work(job: dict, answer: int) -> None:
    """Runs the code and ends the process."""
    write, leave = os.write, os._exit  # the code may set others
    signal.alarm(job["seconds"])
    for name, most in job["limits"].items():
        with contextlib.suppress(ValueError, OSError):  # not every system has all, or takes less than what is used
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            # A second beyond the soft limit of processor time, whose signal says which limit it was.
            resource.setrlimit(kind, (most, most + 1 if name == "CPU" else most))
    sys.addaudithook(_guard(job["directory"]))
    module = sys.modules["answer"] = types.ModuleType("answer")
    try:
        exec(compile(job["code"], "answer.py", "exec"), module.__dict__)
        outcome = job["token"]
    except BaseException as error:  # SystemExit is no success
        outcome = f"{type(error).__name__}: {error}"
    write(answer, outcome[:500].encode(errors="replace"))
    leave(0)


def _guard(directory: str) -> Callable[[str, tuple], None]:
    """An audit hook that raises PermissionError for processes, sockets, and changes outside of `directory`."""
    inside = (os.path.realpath(directory) + os.sep, os.devnull)

    def check_path(event: str, path: object) -> None:
        if isinstance(path, int):
            return
        if not os.path.realpath(os.fsdecode(path)).startswith(inside):
            raise PermissionError(f"{event} outside of the working directory")

    def hook(event: str, args: tuple) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed")
        if event == "open" and args[2] & _WRITING:
            check_path(event, args[0])
        for path in args[: _CHANGES.get(event, 0)]:
            check_path(event, path)

    return hook


if __name__ == "__main__":
    main()
