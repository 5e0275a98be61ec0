"""Several processes that run one program: how they find each other, meet, tell each other things, and end together.

A run on one machine is one process; then nothing here costs anything, and nobody is waited for. On several hosts every
one of them starts the same command. `connected` makes them one run, before any device is used. From then on:

- what they do in step goes through `Meetings`, all of which have a time limit;
- an error in one of them, told to the others, ends all, with its exit status and its message;
- one that is killed or lost is missed within the heartbeat's time limit, and JAX then ends the others.

JAX offers the client of its coordination service in no public place, nor its description of a cluster before
`jax.distributed.initialize`: both are used here, and nowhere else.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import flags
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.errors import JaxRuntimeError

from ftjax import cli
from ftjax.errors import TransientError, UserError

LIMIT_SECONDS = 600.0  # how long one process waits for another
LOADING_SECONDS = 6 * 3600.0  # and for the one that is slowest to tokenize or to read the weights

_OVER = "ftjax/over"  # the key that tells that the run has ended, and how
_ENDED_WELL = "well"
_GOODBYE_SECONDS = 5.0  # how long the first process, without which no other can go on, waits for them to leave


class Cluster(NamedTuple):
    """Where this process stands among those of the run."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # the host's devices that are this process's; None: all


def count() -> int:
    """How many processes the run has. (`jax.process_count` asks the same of the devices, and so starts them.)"""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """Which of them this one is."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return index() == 0


# How they find each other


def define_flags() -> None:
    """The flags of a command line that runs on several hosts; environment variables do as well."""
    flags.DEFINE_string("coordinator", None, "on several hosts: HOST:PORT of process 0 (or FTJAX_COORDINATOR)")
    flags.DEFINE_integer("processes", None, "on several hosts: how many processes (or FTJAX_PROCESSES)", lower_bound=1)
    flags.DEFINE_integer("process", None, "on several hosts: which one this is (or FTJAX_PROCESS)", lower_bound=0)
    flags.DEFINE_integer("heartbeat_timeout", 60, "seconds after which a silent process is lost", lower_bound=5)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes at the start", lower_bound=1)


def find(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> Cluster | None:
    """The run that this process is a part of, None where it is alone.

    What is not given is read from FTJAX_COORDINATOR, FTJAX_PROCESSES and FTJAX_PROCESS, then found as JAX finds it: on
    TPU pods, under SLURM, Open MPI and in GKE's JobSets. timeout: seconds to wait for the coordinator's name.
    Raises UserError for a description that is incomplete or contradicts itself.
    """
    coordinator = coordinator or os.environ.get("FTJAX_COORDINATOR")
    processes = _number("FTJAX_PROCESSES") if processes is None else processes
    if process is None:
        # Who names the coordinator need not number the processes where the scheduler does.
        names = ["FTJAX_PROCESS", *(["JOB_COMPLETION_INDEX", "SLURM_PROCID"] if coordinator or processes else [])]
        process = next((number for name in names if (number := _number(name)) is not None), None)
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if processes == 1:
        return None
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            variables = [f"FTJAX_{name.removeprefix('--').upper()}" for name in missing]
            raise UserError(f"several hosts: {', '.join(missing)} is missing; give it, or set {', '.join(variables)}")
        if ":" not in coordinator or not coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator {coordinator!r}: it must be HOST:PORT of process 0, such as 10.0.0.1:8482")
        if not process < processes:
            raise UserError(f"--process {process}: {processes} processes are numbered from 0 to {processes - 1}")
        return Cluster(coordinator, processes, process)
    return _detected(timeout)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a number")
    return int(text) if text else None


def _detected(timeout: int) -> Cluster | None:
    kinds = {kind.name: kind for kind in ClusterEnv._cluster_types}
    names = ["ompi", "slurm", "gketpu", "gcetpu"]
    # JAX asks the cluster's API server with this package; a Job's pods have the index, any other pod is alone.
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        names.append("k8s")
    for name in names:
        kind = kinds[name]
        try:
            if not kind.is_env_present():
                continue
            processes = kind.get_process_count()
        except OSError:  # a TPU that is no Google Cloud VM has no metadata server; `check` sees whether that was wrong
            continue
        if processes == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = kind.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        return Cluster(coordinator, processes, kind.get_process_id(), _devices(name, kind.get_local_process_id()))
    return None


def _devices(name: str, local: int | None) -> tuple[int, ...] | None:
    """JAX's rule is one GPU a process, which is wrong where one process has the node, or sees only its own GPU."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    alone = name == "slurm" and all(part.partition("(")[0] == "1" for part in tasks.split(","))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if local is None or alone or (visible is not None and "," not in visible):
        return None
    return (local,)


@contextlib.contextmanager
def connected(values: flags.FlagValues) -> Iterator[None]:
    """The body of a command line, as one of several processes where there are several; see `find`.

    An error in the block, of whatever kind, then ends all processes at once, wherever they are: with several of them
    this does not return from an error, but ends this process with the exit status that `cli.run` would give.

    When not all processes come within --start_timeout, this ends the process as a UserError would.
    """
    cluster = find(values.coordinator, values.processes, values.process, values.start_timeout)
    if cluster is None:
        yield
        return
    _connect(cluster, values.start_timeout, values.heartbeat_timeout)
    client, failing = distributed.global_state.client, threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, failing), name="end-of-run", daemon=True)
    watcher.start()
    with _ending_all(client, failing):
        yield
        with together("ending"):
            pass
    if is_first():
        client.key_value_set(_OVER, _ENDED_WELL)
    watcher.join()
    jax.distributed.shutdown()


def refuse_several(what: str) -> None:
    """UserError where this process was started as one of several."""
    cluster = find(None, None, None, timeout=10)
    if cluster is not None:
        raise UserError(f"{what} runs in one process, and this is one of {cluster.processes}; start it on one host")


def check() -> None:
    """UserError when the devices know of processes that `connected` did not find; to be called once they are in use."""
    if jax.process_count() != count():
        raise UserError(
            f"the devices are those of {jax.process_count()} processes and this run has {count()}; on a TPU pod, start "
            "it on every host with the metadata server in reach, or give --coordinator, --processes and --process"
        )


def _connect(cluster: Cluster, start_timeout: int, heartbeat_timeout: int) -> None:
    # Gloo is what lets CPU devices of several processes compute together; other devices do not look at this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # When its own limit is over, JAX aborts the process from within; ours comes first, and says what to do.
    limit = threading.Timer(start_timeout, _give_up, [cluster, start_timeout])
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=cluster.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=start_timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except JaxRuntimeError as error:
        raise TransientError(
            f"process {cluster.process} of {cluster.processes} cannot join the others at {cluster.coordinator}: {error}"
        ) from error
    finally:
        limit.cancel()


def _give_up(cluster: Cluster, seconds: int) -> None:
    _say(
        f"error: process {cluster.process} of {cluster.processes}: not all processes met at {cluster.coordinator} "
        f"within {seconds} seconds. Start the same command on every host, each with its own number, and let them reach "
        "that port"
    )
    os._exit(1)  # as for TransientError; the main thread is in JAX, which nothing interrupts


# How they end


@contextlib.contextmanager
def _ending_all(client: Any, failing: threading.Event) -> Iterator[None]:
    ended = False
    try:
        yield
        ended = True
    finally:
        if not ended:
            failing.set()
            status, text = cli.explain(sys.exception())
            _say(text)
            told = json.dumps({"process": index(), "status": status, "text": text})
            with contextlib.suppress(JaxRuntimeError):  # another was first, or there is nobody left to be told
                client.key_value_set(_OVER, told)
            _leave(client, status)


def _watch(client: Any, failing: threading.Event) -> None:
    """Waits, in a thread of its own, for the end of the run, and ends this process if it was a failure elsewhere.

    The main thread may be waiting for the one that failed, inside of a computation that nothing can interrupt.
    """
    while True:
        try:
            over = client.blocking_key_value_get(_OVER, 3_600_000)
            break
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # the coordinator is gone: JAX ends this process
    if over == _ENDED_WELL or failing.is_set():
        return
    told = json.loads(over)
    _say(f"ended with process {told['process']}, which said:\n{told['text']}")
    _leave(client, told["status"])


def _leave(client: Any, status: int) -> None:
    """Ends this process; the first one, which is the coordinator, a little after the others."""
    with contextlib.suppress(JaxRuntimeError):
        client.key_value_set(f"ftjax/left/{index()}", "", allow_overwrite=True)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while is_first() and time.monotonic() < deadline and len(client.key_value_dir_get("ftjax/left/")) < count():
            time.sleep(0.05)
        if is_first():
            time.sleep(0.2)  # between the last word of the last one and its end
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not `sys.exit`: at the interpreter's end JAX would wait for processes that are gone, or stuck.
    os._exit(status)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone, and the end must come all the same
        print(text, file=sys.stderr, flush=True)


# How they meet


class Meetings:
    """Meetings under one name: all processes go through the same ones in the same order, each in one thread.

    A second thread needs a name of its own. With a single process nothing here does anything.
    """

    def __init__(self, name: str):
        self._name = name
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def together(self, what: str, limit: float | None = None) -> Iterator[None]:
        """The processes end this block together: its failure in one of them is an OSError in all others.

        Raises OSError, too, when one has not come within `limit` seconds (by default LIMIT_SECONDS).
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            if count() > 1:
                # A process that failed tells the others, whose error it is to raise; its own is already on the way.
                others = self._meet(what, failed, limit)
                if others and not failed:
                    raise OSError(f"{what}: failed in process {', '.join(others)}; its own message says why")

    def tell(self, text: str | None, limit: float | None = None) -> str:
        """What the first process has in `text`, in every process (the others' own `text` does not matter).

        Raises OSError when it has not come within `limit` seconds.
        """
        if count() == 1:
            return text
        client, name = self._next("tell")
        if is_first():
            client.key_value_set(name, text)
            return text
        try:
            return client.blocking_key_value_get(name, _milliseconds(limit))
        except JaxRuntimeError as error:
            raise OSError(f"process 0 did not tell what the others wait for ({error})") from error

    def collect(self, text: str, limit: float | None = None) -> list[str]:
        """In the first process the `text` of each, in order; in the others []. Raises OSError as `together` does."""
        if count() == 1:
            return [text]
        client, name = self._next("collect")
        try:
            client.key_value_set(f"{name}/{index()}", text)
            if not is_first():
                return []
            texts = [client.blocking_key_value_get(f"{name}/{i}", _milliseconds(limit)) for i in range(count())]
            client.key_value_delete(f"{name}/")
        except JaxRuntimeError as error:
            raise OSError(f"not every process told the first what it waits for ({error})") from error
        return texts

    def _meet(self, what: str, failed: bool, limit: float | None) -> list[str]:
        """The processes that have failed; OSError when not all come in time, unless this one has its own error."""
        client, name = self._next("together")
        try:
            if failed:
                client.key_value_set(f"{name}/failed/{index()}", "failed")
            client.wait_at_barrier(f"{name}/met", _milliseconds(limit))
            return sorted(key.rpartition("/")[2] for key, _ in client.key_value_dir_get(f"{name}/failed/"))
        except JaxRuntimeError as error:
            if failed:
                return []
            seconds = _milliseconds(limit) / 1000
            raise OSError(f"{what}: not all processes came within {seconds:g} seconds ({error})") from error

    def _next(self, kind: str) -> tuple[Any, str]:
        return distributed.global_state.client, f"ftjax/{kind}/{self._name}/{next(self._numbers)}"


def _milliseconds(limit: float | None) -> int:
    return int((LIMIT_SECONDS if limit is None else limit) * 1000)


_MAIN = Meetings("main")  # of the main thread
together, tell, collect = _MAIN.together, _MAIN.tell, _MAIN.collect
