"""Trainings as jobs of SLURM, by scripts/slurm/train.sbatch, which requeues itself (docs/slurm.md)."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ftjax.errors import UserError
from ftjax.hosted.jobs.backend import Found, State, Task

_ENDED = re.compile(r"^--- \S+ ended with status (\d+)$", re.MULTILINE)  # what the script says at its end
_SECONDS = 60  # that a command of SLURM may take


class Slurm:
    """A task is the job that has its name, so it is found again by whoever asks.

    options: of sbatch, such as --gpus-per-node=8 and --time=12:00:00.
    script: train.sbatch of a checkout that all nodes see. The folder of jobs must be on a disk that they share.
    """

    def __init__(self, script: Path, options: Sequence[str] = ()):
        if not script.is_file():
            raise UserError(f"{script}: no such file; name scripts/slurm/train.sbatch of a checkout")
        self._script, self._options = script, tuple(options)

    def start(self, task: Task) -> None:
        number = self._number(task)
        if number is None or number:
            return
        task.folder.mkdir(parents=True, exist_ok=True)
        log = task.folder / "log"
        log.unlink(missing_ok=True)
        root = self._script.resolve().parents[2]
        named = (f"--job-name={task.name}", f"--output={log}", f"--chdir={root}", f"--export=ALL,FTJAX_ROOT={root}")
        done = _run("sbatch", "--parsable", *named, *self._options, str(self._script), *task.arguments[2:])
        if done.returncode:
            raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")

    def poll(self, task: Task) -> Found:
        number = self._number(task)
        if number is None:
            return Found(State.UNKNOWN)
        if number:
            return Found(State.RUNNING)
        ends = _ENDED.findall(task.log())
        return Found(State.ENDED, int(ends[-1])) if ends else Found(State.ABSENT)

    def stop(self, task: Task) -> bool:
        number = self._number(task)
        return bool(number) and _run("scancel", number).returncode == 0

    def kill(self, task: Task) -> None:
        if number := self._number(task):
            _run("scancel", "--signal=KILL", number)

    def _number(self, task: Task) -> str | None:
        """SLURM's number of the job, "" where it has none (any more), None where it does not answer."""
        done = _run("squeue", "--noheader", f"--name={task.name}", "--format=%i")
        return None if done.returncode else done.stdout.strip().partition("\n")[0]


def _run(*command: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here; the server must run where jobs are submitted") from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer")
