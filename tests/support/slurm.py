"""A real SLURM of one node for the length of a test, where Debian's packages (slurm-wlm, munge) or others have put one.

Its daemons run as whoever runs the test, over files in one folder, on ports of this machine that nothing else can
reach.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")

# A requeued job waits for cred_expire seconds, 5 at least, and one that was canceled has KillWait seconds to save. To
# SLURM the node has four CPUs, whatever the machine has.
CONFIG = """
ClusterName=ftjax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
FirstJobId={first}
KillWait=20
ReturnToService=2
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """What an administrator asks of it."""

    def jobs(self, name: str = "") -> list[str]:
        """`NUMBER STATE RESTARTS` of its jobs, or of those of a name, in their order and with those that have ended."""
        wanted = [f"--name={name}"] if name else []
        lines = run("squeue", "--states=all", "--noheader", "--Format=JobID,State,RestartCnt", *wanted).splitlines()
        return sorted(" ".join(line.split()) for line in lines)

    def states(self, name: str = "") -> list[str]:
        return [line.split()[1] for line in self.jobs(name)]

    def number(self, name: str) -> str:
        """Of the last job of a name."""
        return self.jobs(name)[-1].split()[0]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def checkout(folder: Path, *python: str) -> Path:
    """train.sbatch of a checkout below `folder` whose .venv/bin/python is this command."""
    script, program = folder / "scripts/slurm/train.sbatch", folder / ".venv/bin/python"
    for path in (script, program):
        path.parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts/slurm/train.sbatch", script)
    words = " ".join(f"'{word}'" for word in python)
    program.write_text(f"#!/bin/sh\nexport PYTHONPATH='{ROOT}'\nexec {words} \"$@\"\n")
    program.chmod(0o755)
    return script


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Its programs find it by SLURM_CONF until the end; skips the test where it is not installed."""
    paths = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])  # where Debian puts daemons, for root's PATH alone
    missing = [name for name in PROGRAMS if shutil.which(name, path=paths) is None]
    if missing or sys.platform != "linux":
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="ftjax-slurm-"))  # a short path, as that of a socket must be
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SRUN"))]:
            patch.delenv(name)  # of a job that these tests are a part of
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        _configure(folder)
        # The first to begin is the last to end, and slurmd waits for the steps of its jobs.
        stack.enter_context(_munged(folder, paths))
        for name in ("slurmctld", "slurmd"):
            stack.enter_context(_daemon(folder, [shutil.which(name, path=paths), "-D"]))
        stack.callback(_end_jobs)
        _until(lambda: "idle" in _told("sinfo", "--noheader", "--format=%T"), folder)
        yield Slurm()


def _configure(folder: Path) -> None:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o711)  # munge wants everyone to reach its socket
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        controller, node = (sock.getsockname()[1] for sock in (one, other))
    values = {
        "controller": controller,
        "node": node,
        "user": getpass.getuser(),
        "host": socket.gethostname().partition(".")[0],
    }
    # From the number follows the port at which the processes of a run meet.
    text = CONFIG.format(folder=folder, first=1000 + secrets.randbelow(8000), **values)
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge/key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


@contextlib.contextmanager
def _munged(folder: Path, paths: str) -> Iterator[None]:
    own = folder / "munge"
    files = [f"--{name}-file={own / name}" for name in ("key", "pid", "log", "seed")]
    with _daemon(folder, [shutil.which("munged", path=paths), "--foreground", f"--socket={own / 'socket'}", *files]):
        _until((own / "socket").exists, folder)
        yield


@contextlib.contextmanager
def _daemon(folder: Path, command: list[str]) -> Iterator[None]:
    log = folder / f"{Path(command[0]).name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_jobs() -> None:
    """Nothing of a job is left; what does not end by itself is killed after KillWait."""
    for number in _told("squeue", "--noheader", "--format=%i").split():
        _told("scancel", number)
    end = time.monotonic() + 60
    while _told("squeue", "--noheader", "--format=%i") and time.monotonic() < end:
        time.sleep(0.2)


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def _until(reached, folder: Path) -> None:
    end = time.monotonic() + 30
    while not reached():
        logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
        assert time.monotonic() < end, f"SLURM does not start\n{logs}"
        time.sleep(0.1)
