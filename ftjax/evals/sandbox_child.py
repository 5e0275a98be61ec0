"""What `sandbox.run` starts: reads a job from stdin, runs its code within limits, and says on stdout how it ended.

Runs under `python -I -S`, so it imports the standard library only.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
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


# Landlock's calls (landlock(7)), alike on all machines; bits of what it can forbid of files, and of reading alone.
_CREATE, _ADD, _RESTRICT, _NO_NEW_PRIVILEGES = 444, 445, 446, 38
_ALL, _READ, _READ_FILE, _WRITE_FILE = (1 << 15) - 1, 0b1101, 0b100, 0b10
_ABI = 3  # the first that can forbid all of it


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
    if job["confined"] and (trouble := _confine(job["directory"])):
        write(answer, f"{job['token']} {trouble}".encode())
        leave(0)
    sys.addaudithook(_guard(job["directory"]))
    module = sys.modules["answer"] = types.ModuleType("answer")
    call, token = job["call"], job.pop("token")
    try:
        exec(compile(job["code"], "answer.py", "exec"), module.__dict__)
        outcome = token
        if call is not None:
            outcome += json.dumps(float(module.__dict__[call[0]](*call[1])))
    except BaseException as error:  # SystemExit is no success
        outcome = f"{type(error).__name__}: {error}"
    write(answer, outcome[:500].encode(errors="replace"))
    leave(0)


def _confine(directory: str) -> str:
    """Lets the process read Python's own files and those of `directory`, where it may also write, and no others.

    The kernel holds it (Landlock), whatever the code does; why it cannot, or "".
    """
    system = ctypes.CDLL(None, use_errno=True).syscall
    if system(_CREATE, None, 0, 1) < _ABI:
        return "this kernel has no Landlock, or an old one"
    allowed = dict.fromkeys((os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib", "/usr/lib64"), _READ)
    allowed |= dict.fromkeys(("/dev/null", "/dev/urandom"), _READ_FILE | _WRITE_FILE) | {directory: _ALL & ~1}
    # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped, of which older kernels know less.
    rules = system(_CREATE, struct.pack("Q", _ALL), 8, 0)
    for path, rights in allowed.items():
        if os.path.exists(path):
            beneath = os.open(path, os.O_PATH)
            if system(_ADD, rules, 1, struct.pack("=Qi", rights, beneath), 0):
                return f"Landlock does not take {path}"
            os.close(beneath)
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return "Landlock refuses" if system(_RESTRICT, rules, 0) else ""


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
