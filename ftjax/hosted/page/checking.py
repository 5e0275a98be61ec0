"""POST /v1/ftjax/files/{id}/check: what the check of a job's rows would find, before there is a job."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from ftjax.cli import EXIT_MISTAKE
from ftjax.data.audit.findings import ERROR
from ftjax.hosted.files import File, Files
from ftjax.hosted.jobs import configuring, validating
from ftjax.hosted.jobs.backend import Local, State, Task
from ftjax.hosted.jobs.jobs import of_rows
from ftjax.hosted.jobs.requests import Asked, Method, NewJob, Text
from ftjax.hosted.jobs.tables import Job
from ftjax.hosted.refusals import Refused
from ftjax.hosted.shares import Shares

_SECONDS = 300.0  # that a check may take
_LOOK = 0.1  # seconds between two looks at one
_AT_ONCE, _OF_KEY, _OPEN = 2, 1, 4  # checks at the same time, those of a key, and those of it that may wait, too
_FIGURES = ("rows", "looked_at", "used", "heldout", "truncated", "copies", "near_copies", "tokens", "trained")


class Check(Asked):
    """The body. Rewards have a grader, which jobs check; the rows of one are not looked at here."""

    method: Literal["supervised", "dpo"] = "supervised"
    validation_file: Text | None = None


def routes(files: Files, settings: Mapping[str, Any], seconds: float = _SECONDS) -> APIRouter:
    """settings: config keys that all jobs share; seconds: that a check may take."""
    router, shares = APIRouter(), Shares("checks", _AT_ONCE, _OF_KEY, _OPEN)

    @router.post("/v1/ftjax/files/{file_id}/check")
    async def check(file_id: str, asked: Check, request: Request) -> dict[str, Any]:
        owner = request.state.owner
        async with shares.of(owner):
            train = await anyio.to_thread.run_sync(of_rows, files, file_id, owner)
            heldout = None
            if asked.validation_file is not None:
                heldout = await anyio.to_thread.run_sync(of_rows, files, asked.validation_file, owner)
            return await _checked(files, settings, asked.method, train, heldout, seconds, request)

    return router


async def _checked(
    files: Files,
    settings: Mapping[str, Any],
    method: str,
    train: File,
    heldout: File | None,
    seconds: float,
    request: Request,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ftjax-check-") as folder:
        config, report = Path(folder) / "job.json", Path(folder) / "report.json"
        names = {str(files.path(file)): file.filename for file in (train, heldout) if file is not None}
        values = configuring.config(
            _job(train, heldout, method), settings, files.path(train), heldout and files.path(heldout)
        )
        config.write_text(json.dumps(values), encoding="utf-8")
        task = Task("check", validating.command(config, report), Path(folder) / "check")
        try:
            with anyio.fail_after(seconds):
                status = await _ended(task, request)
        except TimeoutError:
            raise Refused(
                f"the check took longer than {seconds:g} s and was ended; a job checks its rows without that limit",
                param="file_id",
                code="check_too_long",
            ) from None
        said = validating.mistake(task.log())
        found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    if found is None and (status != EXIT_MISTAKE or not said):
        raise Refused(f"the check ended with status {status}; try again", code="check_failed", status=503)
    return _answer(train.id, method, found, said, names)


async def _ended(task: Task, request: Request) -> int | None:
    """The status that a task ends with, beside the server on its CPUs; it is killed where nobody waits any more."""
    backend = Local({"JAX_PLATFORMS": "cpu"})
    backend.start(task)
    try:
        while (found := backend.poll(task)).state is State.RUNNING:
            if await request.is_disconnected():
                raise ClientDisconnect
            await anyio.sleep(_LOOK)
        return found.status
    finally:
        with anyio.CancelScope(shield=True):
            while backend.poll(task).state is State.RUNNING:  # in its first moment it cannot be killed yet
                backend.kill(task)
                await anyio.sleep(_LOOK)


def _job(train: File, heldout: File | None, method: str) -> Job:
    """As a request that leaves all open would make it."""
    asked = NewJob(model="", training_file=train.id, method=Method(type=method))
    _, open_ones = asked.of_method()
    return Job(
        method=method,
        asked=open_ones,
        hyperparameters=open_ones,
        adapter=None,
        seed=0,
        training_file=train.id,
        validation_file=heldout and heldout.id,
    )


def _answer(file: str, method: str, found: dict | None, said: str, names: dict[str, str]) -> dict[str, Any]:
    """found: the report; None where the rows cannot be read at all, of which `said` has the reason."""
    findings = [{"severity": ERROR, "code": "unreadable", "message": said, "count": 1, "places": []}]
    if found is not None:
        kept = ("severity", "code", "message", "count", "places")
        findings = [{name: finding[name] for name in kept} for finding in found["findings"]]
    for finding in findings:
        finding["message"] = validating.renamed(finding["message"], names)
        finding["places"] = [validating.renamed(place, names) for place in finding["places"]]
    chosen = found["chosen"] if found else {}
    return {
        "object": "ftjax.file_check",
        "file": file,
        "method": method,
        "passed": all(finding["severity"] != ERROR for finding in findings),
        "findings": findings,
        "figures": {name: found[name] for name in _FIGURES} if found else {},
        "auto": {name: chosen[theirs] for name, theirs in _AUTO.items() if theirs in chosen},
    }


# What "auto" would stand for: hyperparameter of a request -> key of `ftjax.inspect_data`'s report.
_AUTO = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate": "learning_rate"}
