"""Trainings as JobSets of Kubernetes, by scripts/gke/render.py (docs/gke.md)."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftjax.cli import EXIT_MISTAKE
from ftjax.errors import UserError
from ftjax.hosted.jobs.backend import Found, State, Task

_SECONDS = 60  # that a call of kubectl may take
_NAME = "jobset.sigs.k8s.io/jobset-name"


class JobSets:
    """A task is the JobSet that has its name, so it is found again by whoever asks.

    options: of render.py, all but --name. script: render.py of a checkout. The folder of jobs must lie on the volume
    of --claim, and be there under the same path as in the containers (--mount).
    """

    def __init__(self, script: Path, options: Sequence[str], namespace: str = "default"):
        if not script.is_file():
            raise UserError(f"{script}: no such file; name scripts/gke/render.py of a checkout")
        self._script, self._options, self._namespace = script, tuple(options), namespace

    def start(self, task: Task) -> None:
        found = self._find(task)
        if found is None or (found and not _end(found)):
            return
        task.folder.mkdir(parents=True, exist_ok=True)
        if found and self._kubectl("delete", "jobset", task.name, "--cascade=foreground").returncode:
            return  # the next turn tries again
        options = ("--name", task.name, "--namespace", self._namespace, *self._options)
        rendered = subprocess.run(
            [sys.executable, str(self._script), *options, "--", *task.arguments[2:]],
            capture_output=True,
            text=True,
            check=False,
        )
        if rendered.returncode:
            raise UserError(f"{self._script.name} refuses the job: {rendered.stderr.strip()}")
        applied = self._kubectl("apply", "-f", "-", input=rendered.stdout)
        if applied.returncode:
            raise UserError(f"kubectl refuses the job: {applied.stderr.strip()}")

    def poll(self, task: Task) -> Found:
        found = self._find(task)
        if found is None:
            return Found(State.UNKNOWN)
        if not found:
            return Found(State.ABSENT)
        end = _end(found)
        if not end:
            return Found(State.RUNNING)
        if end == "Completed":
            return Found(State.ENDED, 0)
        logs = self._kubectl("logs", f"--selector={_NAME}={task.name}", "--tail=200")
        if not logs.returncode and logs.stdout:
            (task.folder / "log").write_text(logs.stdout)
        return Found(State.ENDED, self._status(task))

    def stop(self, task: Task) -> bool:
        """Its pods get SIGTERM, and the time of --grace; it is there until they are gone."""
        found = self._find(task)
        if not found:
            return False
        done = self._kubectl("delete", "jobset", task.name, "--cascade=foreground", "--wait=false")
        return done.returncode == 0

    def kill(self, task: Task) -> None:
        self._kubectl("delete", "pods", f"--selector={_NAME}={task.name}", "--grace-period=0", "--force")

    def _status(self, task: Task) -> int:
        """What its processes ended with; a mistake that one of them reports is that of all."""
        done = self._kubectl("get", "pods", f"--selector={_NAME}={task.name}", "--output=json")
        pods = json.loads(done.stdout)["items"] if not done.returncode else []
        states = [one["state"] for pod in pods for one in pod["status"].get("containerStatuses", ())]
        codes = [state["terminated"]["exitCode"] for state in states if "terminated" in state]
        return EXIT_MISTAKE if EXIT_MISTAKE in codes else next((code for code in codes if code), 1)

    def _find(self, task: Task) -> dict[str, Any] | None:
        """The JobSet, {} where there is none, None where the cluster does not answer."""
        done = self._kubectl("get", "jobset", task.name, "--ignore-not-found", "--output=json")
        return None if done.returncode else json.loads(done.stdout or "{}")

    def _kubectl(self, *words: str, input: str | None = None) -> subprocess.CompletedProcess:
        command = ["kubectl", f"--namespace={self._namespace}", *words]
        try:
            return subprocess.run(command, input=input, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except FileNotFoundError as error:
            raise UserError("there is no kubectl here; install it, and give it the cluster's credentials") from error
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", "no answer")


def _end(found: dict[str, Any]) -> str:
    """ "Completed" or "Failed", "" of one that goes on. One that is being deleted still runs."""
    if "deletionTimestamp" in found.get("metadata", {}):
        return ""
    true = [one["type"] for one in found.get("status", {}).get("conditions", ()) if one["status"] == "True"]
    return next((kind for kind in ("Completed", "Failed") if kind in true), "")
