"""Several processes that run one program: how they find each other, synchronize, exchange text, and end together.

A run on one machine is one process; everything here then returns at once. On several hosts the same command is started
on each. `connected` joins the processes to one run, before any device is used. From then on:

- whatever they do in step goes through `Meetings`, every one of which has a time limit;
- an error in one process is reported to the others and ends all of them, with its exit status and its message;
- a process that is killed or lost is noticed within the heartbeat's time limit, and JAX then ends the others.

The client of JAX's coordination service and its cluster detection before `jax.distributed.initialize` are not public;
they are used in this module only. What is public, a barrier across devices, hangs when one process has failed.
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
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags
from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from ftjax import cli
from ftjax.errors import TransientError, UserError

LIMIT_SECONDS = 600.0  # how long one process waits for another
LOADING_SECONDS = 6 * 3600.0  # the same where processes tokenize or read weights, each at its own speed

_OVER = "ftjax/over"  # the key whose value says that the run has ended, and how
_ENDED_WELL = "well"
_GOODBYE_SECONDS = 5.0  # process 0 serves the keys and barriers, so it leaves last, after at most this long


class Cluster(NamedTuple):
    """The processes of a run, and which of them this one is."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # local ids of the devices that this process uses; None: all


def count() -> int:
    """The number of processes. (`jax.process_count` would start the devices, which must come after `connected`.)"""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """The number of this process, from 0."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def is_first() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return index() == 0


# How they find each other


def define_flags() -> None:
    """The flags of a command line that runs on several hosts; environment variables do as well."""
    flags.DEFINE_string("coordinator", None, "on several hosts: HOST:PORT of process 0 (or FTJAX_COORDINATOR)")
    flags.DEFINE_integer("processes", None, "on several hosts: how many processes (or FTJAX_PROCESSES)", lower_bound=1)
    flags.DEFINE_integer("process", None, "on several hosts: which one this is (or FTJAX_PROCESS)", lower_bound=0)
    flags.DEFINE_integer("heartbeat_timeout", 60, "seconds after which a silent process counts as lost", lower_bound=5)
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes at the start", lower_bound=1)


def find_cluster(coordinator: str | None, processes: int | None, process: int | None, timeout: int) -> Cluster | None:
    """The run that this process is a part of, None where it is alone.

    Arguments that are None are read from FTJAX_COORDINATOR, FTJAX_PROCESSES and FTJAX_PROCESS. Where nothing is set,
    the cluster is detected as JAX does: on TPU pods, under SLURM, Open MPI and in GKE's JobSets.
    timeout: seconds to wait for the coordinator's name. Raises UserError for an incomplete or contradictory cluster.
    """
    coordinator = coordinator or os.environ.get("FTJAX_COORDINATOR")
    processes = _number("FTJAX_PROCESSES") if processes is None else processes
    if process is None:
        # Where the coordinator is given, the process number may still come from the scheduler.
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
    environments = {environment.name: environment for environment in ClusterEnv._cluster_types}
    names = ["ompi", "slurm", "gketpu", "gcetpu"]
    # JAX asks Kubernetes' API server with this package. Pods outside of an indexed Job lack the variable and are alone.
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        names.append("k8s")
    for name in names:
        environment = environments[name]
        try:
            if not environment.is_env_present():
                continue
            processes = environment.get_process_count()
        except OSError:  # no metadata server, as on a TPU outside Google Cloud; `check` later notices a missed cluster
            continue
        if processes == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = environment.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)
        devices = _devices(name, environment.get_local_process_id())
        return Cluster(coordinator, processes, environment.get_process_id(), devices)
    return None


def _devices(name: str, local: int | None) -> tuple[int, ...] | None:
    """JAX gives each process one GPU, which is wrong for the only process of a node, or one that sees only its GPU."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    alone = name == "slurm" and all(part.partition("(")[0] == "1" for part in tasks.split(","))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if local is None or alone or (visible is not None and "," not in visible):
        return None
    return (local,)


@contextlib.contextmanager
def connected(values: flags.FlagValues) -> Iterator[None]:
    """Runs the body of a command line as one of several processes where there are several; see `find_cluster`.

    With several, an error of any kind in the block ends all of them with the exit status that `cli.run` would give; so
    does --start_timeout, with status 1, when not all have come by then.
    """
    cluster = find_cluster(values.coordinator, values.processes, values.process, values.start_timeout)
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
    cluster = find_cluster(None, None, None, timeout=10)
    if cluster is not None:
        raise UserError(f"{what} runs in one process, and this is one of {cluster.processes}; start it on one host")


def check() -> None:
    """UserError when the devices belong to more processes than `connected` found; call it once devices are in use."""
    if jax.process_count() != count():
        raise UserError(
            f"the devices are those of {jax.process_count()} processes and this run has {count()}; on a TPU pod, start "
            "it on every host with the metadata server in reach, or give --coordinator, --processes and --process"
        )


def meet_devices() -> None:
    """The first computation of all processes together, which connects their devices.

    Gloo waits for all of them for 30 seconds only, and one may compile for so much longer than another.
    """
    if count() > 1:
        with together("loading", limit=LOADING_SECONDS):
            pass
        multihost_utils.sync_global_devices("ftjax")


def _connect(cluster: Cluster, start_timeout: int, heartbeat_timeout: int) -> None:
    # CPU devices of several processes need Gloo to compute together; other devices ignore the setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # At JAX's own time limit its C++ code aborts the process. This timer fires first, with a message that helps.
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
    say(
        f"error: process {cluster.process} of {cluster.processes}: not all processes met at {cluster.coordinator} "
        f"within {seconds} seconds. Start the same command on every host, each with its own number, and let them reach "
        "that port"
    )
    os._exit(1)  # the status of a TransientError; the main thread is inside JAX, where no exception reaches it


# How they end


@contextlib.contextmanager
def _ending_all(client: Any, failing: threading.Event) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # Ctrl-C and sys.exit, too: the others would wait for this process without end
        failing.set()
        end_now(*cli.explain(error))


def end_now(status: int, text: str) -> NoReturn:
    """Ends this process and all others of the run with this exit status; from any thread."""
    say(text)
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h")  # a progress bar has hidden the cursor
    if (client := distributed.global_state.client) is not None:
        failure = json.dumps({"process": index(), "status": status, "text": text})
        with contextlib.suppress(JaxRuntimeError):  # another process failed first, or the coordinator is gone
            client.key_value_set(_OVER, failure)
        _leave(client, status)
    os._exit(status)


def _watch(client: Any, failing: threading.Event) -> None:
    """Waits, in its own thread, for the end of the run, and ends this process if another one failed.

    The main thread cannot do that: it may be inside a computation, waiting for the failed process without end.
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
    failure = json.loads(over)
    if failure["process"] == index():
        return  # `end_now` in another thread
    say(f"ended with process {failure['process']}, which said:\n{failure['text']}")
    _leave(client, failure["status"])


def _leave(client: Any, status: int) -> NoReturn:
    """Ends this process; process 0, the coordinator, after the others, or JAX would report its loss as their error."""
    with contextlib.suppress(JaxRuntimeError):
        client.key_value_set(f"ftjax/left/{index()}", "", allow_overwrite=True)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while is_first() and time.monotonic() < deadline and len(client.key_value_dir_get("ftjax/left/")) < count():
            time.sleep(0.05)
        if is_first():
            time.sleep(0.2)  # the last process has written its key and needs a moment to exit
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Not `sys.exit`: JAX's exit handlers would wait for processes that are gone or stuck.
    os._exit(status)


def say(text: str) -> None:
    """Prints on stderr, in any process."""
    with contextlib.suppress(OSError):  # the reader of a pipe may be gone; the process must still end
        print(text, file=sys.stderr, flush=True)


# How they meet


class Meetings:
    """Barriers and exchanges of text, under one name: all processes go through them in the same order, in one thread.

    Each is numbered, which is how the processes' calls find each other; so a second thread needs another name. With a
    single process nothing is waited for.
    """

    def __init__(self, name: str):
        self._name = name
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def together(self, what: str, limit: float | None = None) -> Iterator[None]:
        """A barrier at the end of the block: a failure in one process is an OSError in all others.

        Raises OSError also when a process has not come within `limit` seconds (by default LIMIT_SECONDS).
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            if count() > 1:
                # A process that failed reports it and goes on with its own error; the others raise one.
                others = self._meet(what, failed, limit)
                if others and not failed:
                    raise OSError(f"{what}: failed in process {', '.join(others)}; its own message says why")

    def tell(self, text: str | None, limit: float | None = None) -> str:
        """Broadcasts: returns process 0's `text` in every process (the others' own `text` is ignored).

        Raises OSError when it has not arrived within `limit` seconds.
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
            raise OSError(f"process 0 did not send what the others wait for ({error})") from error

    def collect(self, text: str, limit: float | None = None) -> list[str]:
        """Gathers: in process 0 the `text` of each process, in order; elsewhere []. Raises OSError as `together`."""
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
            raise OSError(f"not every process sent what process 0 waits for ({error})") from error
        return texts

    def _meet(self, what: str, failed: bool, limit: float | None) -> list[str]:
        """The numbers of the processes that failed; OSError when not all come in time, unless this one failed."""
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


_MAIN = Meetings("main")  # the main thread's
together, tell, collect = _MAIN.together, _MAIN.tell, _MAIN.collect
