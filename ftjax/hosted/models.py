"""The models of a server: its base, and what jobs have made of it; /v1/models."""

import shutil
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from ftjax.hosted.jobs.tables import OPEN, Checkpoint, Job, now
from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Served


class Trained:
    """`served.Models` of a base and of the checkpoints in the database.

    base: its name in requests; created: when it came, in seconds since 1970.
    """

    def __init__(self, engine: Engine, base: str, created: int | None = None):
        self._engine = engine
        self._base = Served(base, now() if created is None else created)

    def find(self, name: str, owner: str) -> Served:
        if name == self._base.name:
            return self._base
        with Session(self._engine) as session:
            row = session.scalar(_theirs(owner).where(Checkpoint.name == name))
        if row is None:
            raise Refused(
                f"there is no model {name!r}; /v1/models lists those that there are",
                param="model",
                code="model_not_found",
                status=404,
            )
        return _served(row)

    def all(self, owner: str) -> list[Served]:
        with Session(self._engine) as session:
            rows = session.scalars(_theirs(owner).order_by(Checkpoint.number))
            return [self._base, *map(_served, rows)]

    def delete(self, name: str, owner: str) -> None:
        """Takes a model away, and its adapter from the disk.

        Raises Refused: the base, which is everyone's; one that an unfinished job goes on from; one that is not there.
        """
        served = self.find(name, owner)
        if served.adapter is None:
            raise Refused(f"{name} is the base of all models here and cannot be deleted", param="model", status=403)
        with Session(self._engine) as session, session.begin():
            needed = select(Job.id).where(Job.adapter == str(served.adapter), Job.status.in_(OPEN))
            if (job := session.scalar(needed)) is not None:
                raise Refused(f"job {job} goes on from {name}; cancel it, or wait for its end", param="model")
            session.execute(update(Checkpoint).where(Checkpoint.name == name).values(deleted=True))
        shutil.rmtree(served.adapter, ignore_errors=True)


def routes(models: Trained) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    def listed(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [_model(served) for served in models.all(request.state.owner)]}

    @router.get("/v1/models/{name:path}")
    def retrieve(name: str, request: Request) -> dict[str, Any]:
        return _model(models.find(name, request.state.owner))

    @router.delete("/v1/models/{name:path}")
    def delete(name: str, request: Request) -> dict[str, Any]:
        models.delete(name, request.state.owner)
        return {"id": name, "object": "model", "deleted": True}

    return router


def _theirs(owner: str) -> Any:
    return select(Checkpoint).where(Checkpoint.owner == owner, Checkpoint.deleted.is_(False))


def _served(row: Checkpoint) -> Served:
    return Served(row.name, row.created_at, Path(row.adapter), row.owner)


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": served.owner or "system"}
