"""Trainings as jobs of SLURM, by scripts/slurm/train.sbatch, which requeues itself (docs/slurm.md)."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ftjax.errors import UserError
from ftjax.hosted.jobs.backend import Found, State, Task

# What the script says at its start and at its end. SLURM ends it with what it runs, so a canceled one says no end.
_MARKS = re.compile(r"^--- \S+ (?:job \d+, start|ended with status (\d+)$)", re.MULTILINE)
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
        output = str(log).replace("%", "%%")  # which begins a pattern
        named = (f"--job-name={task.name}", f"--output={output}", f"--chdir={root}", f"--export=ALL,FTJAX_ROOT={root}")
        done = _run("sbatch", "--parsable", *named, *self._options, str(self._script), *task.arguments[2:])
        # Where there is no answer, it may have been taken, or not: the next poll tells.
        if done.returncode and self._number(task) == "":
            raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")

    def poll(self, task: Task) -> Found:
        number = self._number(task)
        if number is None:
            return Found(State.UNKNOWN)
        if number:
            return Found(State.RUNNING)
        marks = _MARKS.findall(task.log())
        return Found(State.ENDED, int(marks[-1])) if marks and marks[-1] else Found(State.ABSENT)

    def stop(self, task: Task) -> bool:
        number = self._number(task)
        return bool(number) and _run("scancel", number).returncode == 0

    def kill(self, task: Task) -> None:
        """As `stop`: SLURM kills what has not ended KillWait after it, and knows nothing quicker."""
        self.stop(task)

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
