"""The queue: what is next for each job, with everything that it decides in the database first.

A turn looks at every job that has a stage and takes it on by what is there: a report, a process, a checkpoint, an
adapter. Whatever a turn was doing when the server was killed, the next one finds, and goes on: a command that runs is
left alone, one that was lost is started again and goes on from its checkpoint, and a stage is left in one transaction
with its events, so that each of these happens once.
"""

import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Engine, case, select, update
from sqlalchemy.orm import Session

from ftjax.atomic import write_text
from ftjax.cli import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PREEMPTED
from ftjax.errors import UserError
from ftjax.hosted.jobs import configuring, following, validating
from ftjax.hosted.jobs.backend import Backend, Found, State, Task
from ftjax.hosted.jobs.configuring import Data
from ftjax.hosted.jobs.places import Place
from ftjax.hosted.jobs.tables import EXPORT, OPEN, STOP, TRAIN, VALIDATE, WAIT, Checkpoint, Job, new_id, now, tell

log = logging.getLogger(__name__)

_STOPPED = (EXIT_PREEMPTED, EXIT_INTERRUPTED, 128 + 15)  # saved, or ended before there was anything to save
_FAILURES = 5  # starts in a row that end badly, or are lost, before a step is made
_GRACE = 600.0  # seconds for the save of a run that is stopped


class Queue:
    """Takes jobs on, in `turn`; only one process may do so at a time.

    Args:
      folder: of all jobs. settings: config keys that all share.
      backend: runs the trainings, at most `at_once` of them, and of one key at most `per_key`.
      helpers: runs what looks at rows and exports adapters, beside the server, at most `helping` at a time.
      write: (owner, file name, text) -> the id of a result file.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        settings: Mapping[str, Any],
        backend: Backend,
        helpers: Backend,
        write: Callable[[str, str, str], str],
        at_once: int = 1,
        per_key: int = 1,
        helping: int = 1,
    ):
        self._engine, self._folder, self._settings = engine, folder, dict(settings)
        self._backend, self._helpers, self._write = backend, helpers, write
        self._at_once, self._per_key, self._helping = at_once, per_key, helping
        self._lost: Counter[tuple[str, int]] = Counter()  # exports that ended badly
        self._helps = 0  # tasks of the helpers in this turn

    def place(self, job: str) -> Place:
        return Place(self._folder / job, job)

    def turn(self) -> None:
        """Takes every job as far as it can go now."""
        jobs = self._staged(Job.stage != "")
        self._helps = 0
        steps = {VALIDATE: self._validate, TRAIN: self._train, EXPORT: self._export, STOP: self._stop}
        for job in jobs:
            if job.stage in steps:
                self._safely(steps[job.stage], job)
        running = Counter(job.owner for job in jobs if job.stage == TRAIN or self._still_trains(job))
        waiting = [job for job in jobs if job.stage == WAIT]
        while sum(running.values()) < self._at_once:
            waiting = [job for job in waiting if running[job.owner] < self._per_key]
            if not waiting:
                break
            # The owner with the fewest runs is next, and of those the one that has waited longest.
            job = min(waiting, key=lambda job: (running[job.owner], self._last_turn(job), job.number))
            waiting.remove(job)
            running[job.owner] += 1
            self._safely(self._begin, job)

    def run(self, stop: threading.Event, seconds: float) -> None:
        """Turns until told to stop; what was canceled or paused by then is asked to end, and saves without a server."""
        while True:
            self._tried(self.turn)
            if stop.wait(seconds):
                break
        self._tried(self._ask_to_end)

    def _tried(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # of the database: it may be back at the next turn
            log.exception("the queue of jobs")

    def _ask_to_end(self) -> None:
        for job in self._staged(Job.stage == STOP):
            self._safely(self._stop, job)

    def _staged(self, those: ColumnElement[bool]) -> list[Job]:
        """In their order."""
        with Session(self._engine) as session:
            jobs = list(session.scalars(select(Job).where(those).order_by(Job.number)))
            session.expunge_all()
        return jobs

    def _safely(self, step: Callable[[Job], Any], job: Job) -> None:
        """What fails here fails for one job only, and is tried again at the next turn."""
        try:
            step(job)
        except UserError as error:
            if job.stage != STOP:  # what has its end already has no other
                self._fail(job, {"code": "server_error", "message": self._renamed(job, str(error)), "param": None})
            else:
                log.warning("job %s does not stop: %s", job.id, error)
        except Exception:
            log.exception("job %s, stage %s", job.id, job.stage)

    def _validate(self, job: Job) -> None:
        place = self.place(job.id)
        files = place.train, place.heldout if job.validation_file else None, place.grader if job.grader else None
        if not place.config.is_file():
            self._configure(place, configuring.config(job, self._settings, *files))
        found = self._helped(place.looking())
        if found.state is not State.ENDED:
            return
        data = validating.read(found.status, place.report, place.looking().log(), self._names(job))
        if not isinstance(data, Data):
            self._fail(job, data)
            return
        self._configure(place, configuring.config(job, self._settings, *files, data))
        every, share = configuring.saves(job, data)
        values = {"hyperparameters": configuring.resolved(job, data), "every": every, "share": share}
        with Session(self._engine) as session, session.begin():
            if self._moved(session, job, WAIT, status="queued", **values):
                for warning in validating.warnings(place.report, self._names(job)):
                    tell(session, job.id, warning, "warn")
                tell(session, job.id, "Files validated, moving job to queued state")

    def _begin(self, job: Job) -> None:
        """From here on the job trains, whether or not this server lives to start it."""
        if self._move(job, TRAIN, "Fine-tuning job started", status="running"):
            self._backend.start(self.place(job.id).training())

    def _train(self, job: Job) -> None:
        task = self.place(job.id).training()
        found = self._backend.poll(task)
        run = self._follow(job)
        # In their order; and a step's evaluation, where there is one, is over once there is a later one.
        ends = following.epochs_ends(run.saved, job.every, job.share)
        over = [step for step in ends if run.records and run.records[-1]["step"] > step]
        all(self._exported(job, run, step) for step in over)
        if found.state is State.ENDED and found.status in _STOPPED:
            self._backend.start(task)
        elif found.state is State.ABSENT:
            self._lost_run(job, task)
        elif found.state is State.ENDED and found.status == 0:
            self._move(job, EXPORT, "")
        elif found.state is State.ENDED:
            self._ended_badly(job, task, found.status)

    def _lost_run(self, job: Job, task: Task) -> None:
        """Of a run that was never started, or lost with its machine, nothing is known but its checkpoints."""
        if job.failures >= _FAILURES:
            error = {"code": "server_error", "message": "training is lost again and again", "param": None}
            self._fail(job, error)
        elif self._move(job, TRAIN, "", failures=job.failures + 1):
            self._backend.start(task)

    def _ended_badly(self, job: Job, task: Task, status: int | None) -> None:
        said = self._renamed(job, validating.mistake(task.log()))
        if status == EXIT_MISTAKE:
            names = {name: name for name in self._names(job).values()}
            self._fail(job, validating.failure(said or "training ended with a mistake", names))
        elif job.failures + 1 >= _FAILURES:
            error = {"code": "server_error", "message": said or f"training ended with status {status}", "param": None}
            self._fail(job, error)
        else:
            message = f"Training ended with status {status}; it goes on from its last checkpoint"
            if self._move(job, TRAIN, message, level="warn", failures=job.failures + 1):
                self._backend.start(task)

    def _export(self, job: Job) -> None:
        run = self._follow(job)
        last = run.saved[-1] if run.saved else 0
        ends = [step for step in following.epochs_ends(run.saved, job.every, job.share) if step != last]
        if not all(self._exported(job, run, step, final=step == last) for step in [*ends, last]):
            return
        text = following.results(run)
        files = [self._write(job.owner, "step_metrics.csv", text)]
        values = {"result_files": files, "trained_tokens": following.tokens(run), "estimated_finish": None}
        with Session(self._engine) as session, session.begin():
            if self._moved(session, job, "", status="succeeded", finished_at=now(), **values):
                tell(session, job.id, f"New fine-tuned model created: {job.name}")
                tell(session, job.id, "The job has successfully completed")
        shutil.rmtree(self.place(job.id).workdir / "checkpoints", ignore_errors=True)

    def _exported(self, job: Job, run: following.Run, step: int, final: bool = False) -> bool:
        """Whether the adapter of a step was there, or cannot be had; begins to export it where it was not.

        One that is listed may have been deleted since.
        """
        with Session(self._engine) as session:
            listed = select(Checkpoint).where(Checkpoint.job == job.id, Checkpoint.step == step)
            if session.scalar(listed) is not None:
                return True
        place = self.place(job.id)
        out, task, key = place.adapter(step), place.exporting(step), (job.id, step)
        if not out.is_dir():
            found = self._helped(task)
            if found.state is State.ENDED and not out.is_dir():
                self._lost[key] += 1
                if self._lost[key] < _FAILURES:
                    self._helpers.start(task)
                elif final:
                    raise UserError(f"the adapter of step {step} is not exported: {validating.mistake(task.log())}")
                return self._lost[key] >= _FAILURES
        if not out.is_dir():
            return False
        name = job.name if final or step == run.total else f"{job.name}:ckpt-step-{step}"
        values = {"owner": job.owner, "created_at": now(), "adapter": str(out), "metrics": following.at(run, step)}
        with Session(self._engine) as session, session.begin():
            if not self._moved(session, job, job.stage):
                return False
            session.add(Checkpoint(id=new_id("ftckpt_"), job=job.id, step=step, name=name, **values))
            tell(session, job.id, f"Checkpoint created at step {step}")
        return True

    def _stop(self, job: Job) -> None:
        """Ends what runs for a job that was canceled or paused; it saves first."""
        place = self.place(job.id)
        training = place.training()
        found = self._backend.poll(training)
        self._follow(job)
        if found.state in (State.RUNNING, State.UNKNOWN):
            # Asked once: a second time would end it without its save. The mark is for a server that comes after this.
            if not place.asked.is_file():
                if self._backend.stop(training):
                    write_text(place.asked, str(time.time()))
            elif time.time() - place.asked.stat().st_mtime > _GRACE:
                self._backend.kill(training)
            return
        if self._helpers.poll(place.looking()).state is State.RUNNING:
            self._helpers.kill(place.looking())
            return
        place.asked.unlink(missing_ok=True)
        if not job.every:  # of rows that were not looked at to their end nothing is known
            shutil.rmtree(place.looking().folder, ignore_errors=True)
        # The status is what clients asked for meanwhile, which may have been to resume.
        going_on = Job.status.in_(("queued", "validating_files"))
        with Session(self._engine) as session, session.begin():
            self._moved(session, job, case((going_on, WAIT if job.every else VALIDATE), else_=""))

    def _follow(self, job: Job) -> following.Run:
        """Events of what a run has written since the last turn."""
        run = following.look(self.place(job.id).workdir)
        told = following.events(run, job.step, job.evaluated)
        if not told and run.total == job.total:
            return run
        evaluated = [one.data["step"] for one in told if any(name.startswith("full_") for name in one.data)]
        trained = [one.data["step"] for one in told if not any(name.startswith("full_") for name in one.data)]
        values: dict[str, Any] = {"total": run.total, "estimated_finish": following.finish(run)}
        values |= {"evaluated": max(evaluated)} if evaluated else {}
        values |= {"step": max(trained), "failures": 0} if trained else {}
        with Session(self._engine) as session, session.begin():
            if self._moved(session, job, job.stage, **values):
                for one in told:
                    tell(session, job.id, one.message, data=one.data, type="metrics")
                for name, value in values.items():
                    setattr(job, name, value)
        return run

    def _helped(self, task: Task) -> Found:
        """How it is with a task of the helpers; started where it is lost or new, and there is room for one more."""
        found = self._helpers.poll(task)
        if found.state is State.RUNNING:
            self._helps += 1
        elif found.state is State.ABSENT and self._helps < self._helping:
            self._helps += 1
            self._helpers.start(task)
            return Found(State.RUNNING)
        return found

    def _fail(self, job: Job, error: dict[str, Any]) -> None:
        stage = STOP if job.stage == TRAIN else ""  # whatever has failed, nothing is to run on
        with Session(self._engine) as session, session.begin():
            if self._moved(session, job, stage, status="failed", error=error, finished_at=now(), estimated_finish=None):
                tell(session, job.id, f"The job failed: {error['message']}", "error")

    def _move(self, job: Job, stage: str, message: str, level: str = "info", **values: Any) -> bool:
        with Session(self._engine) as session, session.begin():
            moved = self._moved(session, job, stage, **values)
            if moved and message:
                tell(session, job.id, message, level)
        return moved

    def _moved(self, session: Session, job: Job, stage: Any, **values: Any) -> bool:
        """From the stage that the turn found it in to another; False where a client was quicker."""
        there = update(Job).where(Job.id == job.id, Job.stage == job.stage)
        if job.stage != STOP:
            there = there.where(Job.status.in_(OPEN))
        return session.execute(there.values(stage=stage, **values)).rowcount == 1

    def _still_trains(self, job: Job) -> bool:
        return job.stage == STOP and self._backend.poll(self.place(job.id).training()).state is State.RUNNING

    def _last_turn(self, job: Job) -> int:
        """The number of the latest job of the same owner that was begun: who began last is next after the others."""
        with Session(self._engine) as session:
            begun = select(Job.number).where(Job.owner == job.owner, Job.stage != WAIT, Job.every > 0)
            return session.scalar(begun.order_by(Job.number.desc()).limit(1)) or 0

    def _configure(self, place: Place, values: dict[str, Any]) -> None:
        write_text(place.config, json.dumps(values, indent=2) + "\n")

    def _names(self, job: Job) -> dict[str, str]:
        """{path: what a client calls the file}"""
        place = self.place(job.id)
        names = {str(place.train): f"training_file {job.training_file}"}
        return names | ({str(place.heldout): f"validation_file {job.validation_file}"} if job.validation_file else {})

    def _renamed(self, job: Job, message: str) -> str:
        names = self._names(job) | {str(self.place(job.id).folder): job.id}
        return validating.renamed(message, names)
