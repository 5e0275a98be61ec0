"""What the database knows of jobs: all there is to know, so that a server may end at any moment and another go on."""

import secrets
import string
import time
from typing import Any

from sqlalchemy import JSON, Index
from sqlalchemy.orm import Mapped, Session, mapped_column

from ftjax.hosted.database import Base

_LETTERS = string.ascii_letters + string.digits

# The stages of a job: what the queue has to do for it. "": nothing (any more, or until it is resumed).
VALIDATE, WAIT, TRAIN, EXPORT, STOP = "validate", "wait", "train", "export", "stop"
OPEN = ("validating_files", "queued", "running", "paused")  # statuses that are not final


def new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(24))


def now() -> int:
    return int(time.time())


class Job(Base):
    """A job as it was asked for, and how far it is.

    Attributes:
      status: what clients see; stage: what the queue does for it.
      model: that is named by the request, the base or one that was fine-tuned here; name: of what comes of it.
      asked: the hyperparameters of the request; hyperparameters: with every "auto" resolved, once that is known.
      labels: the request's metadata.
      every: steps between two saves; share: saves of which one is listed as a checkpoint.
      step, evaluated: the last ones that events tell of; failures: starts that ended badly since a step was made.
    """

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)  # the order of creation
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    finished_at: Mapped[int | None]
    status: Mapped[str]
    stage: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    adapter: Mapped[str | None]  # the folder of the one that it goes on from
    name: Mapped[str]
    seed: Mapped[int]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    method: Mapped[str]
    asked: Mapped[dict[str, Any]] = mapped_column(JSON)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    grader: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    result_files: Mapped[list[str]] = mapped_column(JSON)
    trained_tokens: Mapped[int | None]
    estimated_finish: Mapped[int | None]
    every: Mapped[int] = mapped_column(default=0)
    share: Mapped[int] = mapped_column(default=1)
    total: Mapped[int] = mapped_column(default=0)
    step: Mapped[int] = mapped_column(default=0)
    evaluated: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)


class Event(Base):
    """What happened to a job, in the order of `number`."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_of", "job", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[str]
    created_at: Mapped[int]
    level: Mapped[str]
    message: Mapped[str]
    type: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class Checkpoint(Base):
    """A model that can be served: an adapter of a step, under its name. The last one of a job has the job's own."""

    __tablename__ = "job_checkpoints"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[str] = mapped_column(index=True)
    owner: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    step: Mapped[int]
    name: Mapped[str] = mapped_column(unique=True)
    adapter: Mapped[str]  # its folder
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)
    deleted: Mapped[bool] = mapped_column(default=False)


def tell(
    session: Session,
    job: str,
    message: str,
    level: str = "info",
    data: dict[str, Any] | None = None,
    type: str = "message",
) -> None:
    """Adds an event."""
    session.add(
        Event(id=new_id("ftevent-"), job=job, created_at=now(), level=level, message=message, type=type, data=data)
    )
