"""The jobs of a server: made, listed, canceled, paused and resumed by requests; the queue takes them on."""

import contextlib
import json
import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from ftjax.atomic import size, write_text
from ftjax.errors import UserError
from ftjax.evals import graders, sandbox
from ftjax.evals.graders import Judges
from ftjax.hosted.jobs.backend import Backend, Local
from ftjax.hosted.jobs.configuring import check_settings
from ftjax.hosted.jobs.places import ADAPTERS
from ftjax.hosted.jobs.queue import Queue
from ftjax.hosted.jobs.requests import NewJob
from ftjax.hosted.jobs.tables import OPEN, STOP, VALIDATE, WAIT, Checkpoint, Event, Job, new_id, now, tell
from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Models, Served
from ftjax.training import workdir as workdirs

_ID = "ftjob-"
_PURPOSE, _RESULTS = "fine-tune", "fine-tune-results"


def checked(grader: object, judges: Judges, param: str) -> dict[str, Any]:
    """The grader of a request; Refused where it cannot grade. param: where it stands there."""
    try:
        json.dumps(grader, ensure_ascii=False, allow_nan=False).encode()
        if graders.runs_code(found := graders.check(grader, judges)):
            sandbox.call("def grade(): return 1", "grade", [])  # whether the kernel lets such code be kept apart
    except UserError as error:
        raise Refused(str(error), param=param, code="invalid_grader") from error
    except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair, a thousand brackets
        raise Refused(f"the grader is not JSON: {error}", param=param, code="invalid_grader") from error
    return dict(found)


class Files(Protocol):
    """The files of a server, as far as jobs use them (`ftjax.hosted.files`)."""

    def find(self, id: str, owner: str) -> Any: ...
    def path(self, file: Any) -> Path: ...
    def write(self, owner: str, purpose: str, filename: str, chunks: Iterable[bytes]) -> Any: ...


def of_rows(files: Files, id: str, owner: str) -> Any:
    """A file that jobs may train on; Refused where there is none, or it is for something else."""
    file = files.find(id, owner)
    if file.purpose != _PURPOSE:
        raise Refused(
            f"{id} has the purpose {file.purpose!r}; upload it with purpose={_PURPOSE!r}",
            param="file_id",
            code="invalid_file",
        )
    return file


class Jobs:
    """To be used as a context: within it the queue works, in a thread of its own.

    Args:
      folder: for a folder of each job; one server has it for itself.
      settings: config keys that all jobs share, such as model.source, mesh.fsdp and adapter.rank.
      models: names of the base and of what was fine-tuned.
      backend: where trainings run, at most `at_once` at a time, and `per_key` of one key; None: here.
      helpers: where rows are looked at and adapters exported: beside the server, on its CPUs; None: so.
      queued: jobs of a key that do not run and are not final, at most.
      quota: bytes of a key's jobs, with which it may begin no further one.
      kept: seconds after the end of a job for which its run stays; the models that came of it stay. 0: for good.
      seconds: between two turns of the queue.
      judges: who answers graders of the type score_model.

    Raises:
      UserError: a setting that jobs cannot share; another server uses the folder.
    """

    def __init__(
        self,
        engine: Engine,
        files: Files,
        folder: Path,
        settings: Mapping[str, Any],
        models: Models,
        backend: Backend | None = None,
        helpers: Backend | None = None,
        at_once: int = 1,
        per_key: int = 1,
        queued: int = 100,
        quota: int = 64 * 2**30,
        kept: int = 0,
        seconds: float = 1.0,
        judges: Judges = graders.NOBODY,
    ):
        check_settings(settings)
        self._engine, self._files, self._folder, self._models = engine, files, folder, models
        self._queued, self._quota, self._kept = queued, quota, kept
        self._seconds, self.judges = seconds, judges
        helpers = helpers or Local({"JAX_PLATFORMS": "cpu"})
        self.queue = Queue(
            engine, folder, settings, backend or Local(), helpers, self._write, at_once, per_key, helping=at_once
        )
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Jobs":
        with contextlib.ExitStack() as stack:
            stack.enter_context(workdirs.lock(self._folder))
            self._sweep()
            self._thread = threading.Thread(target=self.queue.run, args=(self._end, self._seconds), name="jobs")
            self._end.clear()
            self._thread.start()
            stack.callback(self._thread.join)
            stack.callback(self._end.set)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """The queue ends; what runs goes on, and the next server finds it."""
        self._held.close()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken on: of a server that runs, unless the thread that does it is gone."""
        return self._thread is not None and self._thread.is_alive()

    def create(self, asked: NewJob, owner: str) -> Job:
        """Raises Refused: the files, the model or the number of jobs do not allow it."""
        if asked.integrations:
            raise Refused(
                "integrations are not served; what trackers would get is in the job's events and result file",
                param="integrations",
            )
        method, hyperparameters = asked.of_method()
        unused = [name for name in ("eval_interval", "eval_samples") if hyperparameters.get(name, "auto") != "auto"]
        if unused and asked.validation_file is None:
            raise Refused(
                f"{unused[0]} is of evaluations; give a validation_file", param=f"hyperparameters.{unused[0]}"
            )
        grader = None
        if method == "reinforcement":
            grader = checked(asked.method.reinforcement.grader, self.judges, "method.reinforcement.grader")
        if (used := self.bytes_of(owner)) >= self._quota:
            raise Refused(
                f"the jobs of this key have {size(used)} on the disk, of {size(self._quota)}; delete models",
                code="quota_exceeded",
                status=403,
            )
        served = self._models.find(asked.model, owner)
        files = {name: getattr(asked, name) for name in ("training_file", "validation_file")}
        found = {name: self._file(name, id, owner) for name, id in files.items() if id is not None}
        id = new_id(_ID)
        place = self.queue.place(id)
        base = asked.model.removeprefix("ft:").partition(f":{owner}:")[0] if served.adapter else asked.model
        row = Job(
            id=id,
            owner=owner,
            created_at=now(),
            status="validating_files",
            stage=VALIDATE,
            model=asked.model,
            adapter=served.adapter and str(served.adapter),
            name=f"ft:{base}:{owner}:{asked.suffix or ''}:{id.removeprefix(_ID)[:8]}",
            seed=random.randrange(2**31) if asked.seed is None else asked.seed,
            training_file=asked.training_file,
            validation_file=asked.validation_file,
            method=method,
            asked=hyperparameters,
            hyperparameters=hyperparameters,
            grader=grader,
            labels=asked.metadata,
            result_files=[],
        )
        with self._whole(place.folder), Session(self._engine, expire_on_commit=False) as session, session.begin():
            waits = Job.status.in_(OPEN), Job.status != "running"
            if session.scalar(select(func.count()).where(Job.owner == owner, *waits)) >= self._queued:
                raise Refused(
                    f"this key has {self._queued} jobs that wait; wait for one of them, or cancel it",
                    code="rate_limit_exceeded",
                    status=429,
                )
            for name, source in found.items():
                place.take(self._files.path(source), place.train if name == "training_file" else place.heldout)
            if grader is not None:
                write_text(place.grader, graders.as_text(grader, self.judges))
            session.add(row)
            tell(session, id, f"Created fine-tuning job: {id}")
            tell(session, id, f"Validating training file: {asked.training_file}")
        return row

    def find(self, id: str, owner: str) -> Job:
        """Refused (404) where there is none, or it is another's."""
        with Session(self._engine) as session:
            row = session.scalar(select(Job).where(Job.id == id, Job.owner == owner))
        if row is None:
            raise Refused(f"there is no fine-tuning job {id!r}", param="fine_tuning_job_id", status=404)
        return row

    def all(self, owner: str, after: str | None, limit: int, labels: Mapping[str, str] | None = None) -> list[Job]:
        """The newest first, one more than `limit` at most. labels: those that it has; None: any, and none."""
        query = select(Job).where(Job.owner == owner)
        for name, value in (labels or {}).items():
            if '"' in name or "\\" in name:  # which SQLite's paths cannot spell
                raise Refused(f"metadata[{name}]: jobs are not found by keys with quotes", param="metadata")
            query = query.where(Job.labels[name].as_string() == value)
        return self._page(query, Job, after, limit)

    def unlabeled(self, owner: str, after: str | None, limit: int) -> list[Job]:
        """As `all`, those without metadata."""
        return self._page(select(Job).where(Job.owner == owner, Job.labels.is_(None)), Job, after, limit)

    def events(self, id: str, owner: str, after: str | None, limit: int) -> list[Event]:
        return self._page(select(Event).where(Event.job == self.find(id, owner).id), Event, after, limit)

    def checkpoints(self, id: str, owner: str, after: str | None, limit: int) -> list[Checkpoint]:
        query = select(Checkpoint).where(Checkpoint.job == self.find(id, owner).id, Checkpoint.deleted.is_(False))
        return self._page(query, Checkpoint, after, limit)

    def served(self, name: str, owner: str) -> Served:
        """What a model's name stands for; Refused (404) where it is nobody's, or another's."""
        return self._models.find(name, owner)

    def cancel(self, id: str, owner: str) -> Job:
        """Ends a job; what it has made is saved, and its checkpoints stay."""
        return self._change(id, owner, "cancelled", OPEN, "The job was cancelled", finished_at=now())

    def pause(self, id: str, owner: str) -> Job:
        """Stops a job until it is resumed; what it has made is saved."""
        return self._change(id, owner, "paused", ("validating_files", "queued", "running"), "The job was paused")

    def resume(self, id: str, owner: str) -> Job:
        """Lets a paused job go on from where it was, when it is its turn."""
        row = self.find(id, owner)
        status, stage = ("queued", WAIT) if row.every else ("validating_files", VALIDATE)
        return self._change(id, owner, status, ("paused",), "The job was resumed", stage)

    def bytes_of(self, owner: str) -> int:
        """That the jobs of a key have on the disk, without the files that are files of the key's, too."""
        with Session(self._engine) as session:
            ids = list(session.scalars(select(Job.id).where(Job.owner == owner)))
        total = 0
        for id in ids:
            for folder, _, names in os.walk(self.queue.place(id).folder):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # a run removes what it no longer needs
                        status = os.stat(os.path.join(folder, name))
                        total += status.st_size if status.st_nlink == 1 else 0
        return total

    def expire(self) -> None:
        """Removes the runs of jobs that ended long ago, with the rows that they were trained on."""
        if not self._kept:
            return
        with Session(self._engine) as session:
            old = Job.status.not_in(OPEN), Job.stage == "", Job.finished_at < now() - self._kept
            ids = list(session.scalars(select(Job.id).where(*old)))
        for id in ids:
            folder = self.queue.place(id).folder
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_dir() and path.name != ADAPTERS:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.is_file():
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes the folder of a job that was being made when the server was killed: it has no row."""
        with Session(self._engine) as session:
            known = set(session.scalars(select(Job.id)))
        for path in self._folder.glob(f"{_ID}*"):
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _whole(self, folder: Path) -> Iterator[None]:
        """Nothing of a job remains whose making fails, as where the disk is full."""
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _change(self, id: str, owner: str, status: str, those: tuple[str, ...], told: str, stage="", **values) -> Job:
        """Another status for a job that has one of `those`; the queue ends what runs for it first."""
        row = self.find(id, owner)
        with Session(self._engine) as session, session.begin():
            there = update(Job).where(Job.id == id, Job.status.in_(those))
            idle = there.where(Job.stage.in_(("", WAIT))).values(status=status, stage=stage, **values)
            busy = there.where(Job.stage.not_in(("", WAIT))).values(status=status, stage=STOP, **values)
            if not session.execute(idle).rowcount and not session.execute(busy).rowcount:
                status = session.scalar(select(Job.status).where(Job.id == id))
                allowed = ", ".join(those)
                raise Refused(f"job {id} is {status}; only one that is {allowed} can be", code="invalid_status")
            tell(session, id, told)
        return self.find(row.id, owner)

    def _page(self, query: Any, kind: Any, after: str | None, limit: int) -> list[Any]:
        with Session(self._engine) as session:
            if after is not None:
                last = session.scalar(query.where(kind.id == after))
                if last is None:
                    raise Refused(f"after: there is no {after!r} in this list", param="after")
                query = query.where(kind.number < last.number)
            return list(session.scalars(query.order_by(kind.number.desc()).limit(limit + 1)))

    def _file(self, name: str, id: str, owner: str) -> Any:
        try:
            return of_rows(self._files, id, owner)
        except Refused as refused:
            raise Refused(f"{name}: {refused.message}", param=name, code="invalid_file") from refused

    def _write(self, owner: str, filename: str, text: str) -> str:
        return self._files.write(owner, _RESULTS, filename, [text.encode()]).id
