"""A command line as several processes on this machine, which end with the block that started them."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from support.runs import command, finish

HEARTBEAT = 10  # seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(
    count: int, module: str, *arguments: str, each: Sequence[Sequence[str]] = (), devices: int = 1
) -> Iterator[list[subprocess.Popen]]:
    """python -m MODULE ... as `count` processes of one run. each: further arguments of the single ones."""
    port = free_port()
    processes = []
    try:
        for index in range(count):
            place = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"]
            own = each[index] if each else ()
            limits = [f"--heartbeat_timeout={HEARTBEAT}", "--start_timeout=60"]
            processes.append(command(module, *arguments, *place, *limits, *own, devices=devices))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finished(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What each of them printed; all must end with `status`."""
    return [finish(process, status) for process in processes]


def ended(processes: list[subprocess.Popen], within: float) -> list[int]:
    """Their exit statuses, which must all be there in so many seconds."""
    deadline = time.monotonic() + within
    return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
