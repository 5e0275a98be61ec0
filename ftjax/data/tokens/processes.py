"""Runs a function on many tasks in worker processes; the results come in the order of the tasks.

multiprocessing is not used, because its children import the main module: for a command line that is JAX and all of the
models, and a script without `if __name__ == "__main__"` would start itself again in each of them. These workers import
only what they are sent. Nor is a process with threads forked.
"""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any


@contextlib.contextmanager
def ordered(function: Callable[..., Any], shared: tuple, tasks: Iterable[Any], workers: int) -> Iterator[Iterator[Any]]:
    """An iterator over function(*shared, task) for every task, in order. The workers end with the block.

    Args:
      function: at the top level of a module; it, its arguments and its results are pickled. It should return errors:
        an exception ends the worker and is only seen on stderr.
      workers: how many processes; 0: run in this process.

    Raises:
      RuntimeError: from the iterator; a worker ended before its work was done.
    """
    if not workers:
        yield (function(*shared, task) for task in tasks)
        return
    started: list[tuple[subprocess.Popen, Connection]] = []
    try:
        for _ in range(workers):
            started.append(_start())
        setup = pickle.dumps((function, shared), protocol=pickle.HIGHEST_PROTOCOL)
        yield _in_order({connection: process for process, connection in started}, setup, tasks)
    finally:
        for process, connection in started:
            connection.close()
            process.terminate()
        for process, _ in started:
            process.wait()


def _start() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = socket.socketpair()
    with theirs:
        # The process that started this one ends it, not Ctrl-C.
        code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        code += f"from ftjax.data.tokens.processes import work; work({theirs.fileno()})"
        # The tokenizer gets one thread in each worker: there are as many workers as cores.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()]
        )
    return process, Connection(ours.detach())


def _in_order(processes: dict[Connection, subprocess.Popen], setup: bytes, tasks: Iterable[Any]) -> Iterator[Any]:
    idle, running, done = list(processes), {}, {}
    todo, wanted = enumerate(tasks), 0
    for connection, process in processes.items():
        with _alive(process):
            connection.send_bytes(setup)
    while True:
        # A worker has one task at a time, so neither side ever waits for the other to read. The limit on running and
        # finished tasks keeps few results in memory when one of them is late.
        while idle and len(running) + len(done) < 4 * len(processes) and (item := next(todo, None)):
            connection = idle.pop()
            with _alive(processes[connection]):
                connection.send(item[1])
            running[connection] = item[0]
        if wanted in done:
            yield done.pop(wanted)
            wanted += 1
        elif running:
            for connection in wait(list(running)):
                with _alive(processes[connection]):
                    done[running.pop(connection)] = connection.recv()
                idle.append(connection)
        else:
            return


@contextlib.contextmanager
def _alive(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            f"worker process {process.pid} ended with status {process.wait()} before its work was done; its own "
            "message is above, or it was killed, perhaps because memory ran out"
        ) from error


def work(descriptor: int) -> None:
    """The main function of a worker: receives tasks and sends results until the connection is closed."""
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        function, shared = connection.recv()
        while True:
            connection.send(function(*shared, connection.recv()))
