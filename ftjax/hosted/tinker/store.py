"""What outlives the server: training runs and their checkpoints, whose they are, and where their files lie.

A client names checkpoints by paths, tinker://RUN/KIND/NAME. No part of one becomes a part of a path on the disk: there
they lie in directories with random names.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy.orm import Mapped, Session, mapped_column

from ftjax.hosted.database import Base
from ftjax.hosted.refusals import Refused

WEIGHTS, SAMPLER = "weights", "sampler_weights"
KINDS = {WEIGHTS: "training", SAMPLER: "sampler"}  # as paths have them, and as lists do
_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:=@+-]{0,127}")
_MOST_METADATA = 2**14  # characters, as JSON: of sessions and checkpoints there may be many
_SHORTEST, _LONGEST = 3600, 10 * 365 * 24 * 3600  # seconds that a checkpoint may be kept for


class Opened(Base):
    """A session: what one client does."""

    __tablename__ = "tinker_sessions"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    display_name: Mapped[str | None]
    user_metadata: Mapped[str]  # JSON


class Run(Base):
    """A model in training, or one that was."""

    __tablename__ = "tinker_runs"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    session: Mapped[str] = mapped_column(index=True)
    base_model: Mapped[str]
    shape: Mapped[str]  # JSON: training.Shape
    user_metadata: Mapped[str]  # JSON
    last_at: Mapped[int]


class Checkpoint(Base):
    __tablename__ = "tinker_checkpoints"
    __table_args__ = (sqlalchemy.UniqueConstraint("run", "kind", "name"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    run: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]  # of KINDS
    name: Mapped[str]
    shape: Mapped[str]  # JSON: training.Shape
    base_model: Mapped[str]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    bytes: Mapped[int]
    user_metadata: Mapped[str]  # JSON
    folder: Mapped[str]  # where it lies, a name that comes back for no other

    @property
    def path(self) -> str:
        return f"{_SCHEME}{self.run}/{self.kind}/{self.name}"


class Parsed(NamedTuple):
    """The parts of tinker://RUN/KIND/NAME."""

    run: str
    kind: str
    name: str


def parse(path: str) -> Parsed:
    """Refused where it is no path of a checkpoint."""
    parts = path.removeprefix(_SCHEME).split("/")
    if not path.startswith(_SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
        raise Refused(f"{path!r} is no path of a checkpoint: tinker://RUN/{WEIGHTS}/NAME, or {SAMPLER}", param="path")
    return Parsed(*parts)


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise Refused(
            f"{name!r} is no name of a checkpoint; use up to 128 letters, digits and _.:=@+-, a letter first",
            param="path",
        )


def check_ttl(seconds: int | None) -> None:
    if seconds is not None and not _SHORTEST <= seconds <= _LONGEST:
        raise Refused(
            f"ttl_seconds is {seconds}; use {_SHORTEST} (an hour) to {_LONGEST} (ten years)", param="ttl_seconds"
        )


def _text(metadata: Any) -> str:
    text = json.dumps(metadata or {})
    if len(text) > _MOST_METADATA:
        raise Refused(
            f"user_metadata has {len(text):,} characters as JSON; at most {_MOST_METADATA:,} are kept",
            param="user_metadata",
        )
    return text


class Store:
    """The rows of a database and the directories below `folder`.

    quota: bytes of all checkpoints of a key.
    """

    def __init__(self, engine: sqlalchemy.Engine, folder: Path, quota: int, clock: Callable[[], float] = time.time):
        self._engine, self._folder, self._quota, self._clock = engine, folder, quota, clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Session(engine) as session:
            known = set(session.scalars(sqlalchemy.select(Checkpoint.folder)))
        for path in folder.iterdir():  # what a server that was killed had not finished
            if path.name not in known:
                shutil.rmtree(path)

    def open(self, id: str, owner: str, display_name: str | None, metadata: Any) -> None:
        now = int(self._clock())
        row = {"id": id, "owner": owner, "created_at": now, "display_name": display_name}
        with Session(self._engine) as session, session.begin():
            session.add(Opened(**row, user_metadata=_text(metadata)))

    def session(self, id: str, owner: str) -> Opened:
        return self._one(Opened, id, owner, "session")

    def sessions(self, owner: str, limit: int, offset: int) -> list[str]:
        chosen = sqlalchemy.select(Opened.id).where(Opened.owner == owner).order_by(Opened.number.desc())
        with Session(self._engine) as session:
            return list(session.scalars(chosen.limit(limit).offset(offset)))

    def begin(self, id: str, owner: str, session_id: str, base_model: str, shape: dict, metadata: Any) -> None:
        """A new run; nothing where it is there already."""
        row = {"id": id, "owner": owner, "session": session_id, "base_model": base_model, "shape": json.dumps(shape)}
        row |= {"user_metadata": _text(metadata), "last_at": int(self._clock())}
        with Session(self._engine) as session, session.begin():
            if session.scalar(sqlalchemy.select(Run).where(Run.id == id)) is None:
                session.add(Run(**row))

    def touch(self, id: str) -> None:
        with Session(self._engine) as session, session.begin():
            session.execute(sqlalchemy.update(Run).where(Run.id == id).values(last_at=int(self._clock())))

    def run(self, id: str, owner: str) -> Run:
        return self._one(Run, id, owner, "training run")

    def runs(self, owner: str, limit: int, offset: int) -> tuple[list[Run], int]:
        """Those of a page, the newest first, and how many there are."""
        mine = sqlalchemy.select(Run).where(Run.owner == owner)
        return self._page(mine, Run.number, limit, offset)

    def runs_of(self, session_id: str) -> list[str]:
        with Session(self._engine) as session:
            return list(
                session.scalars(sqlalchemy.select(Run.id).where(Run.session == session_id).order_by(Run.number))
            )

    def checkpoints(
        self, owner: str, run: str | None = None, limit: int = 1000, offset: int = 0
    ) -> tuple[list[Checkpoint], int]:
        mine = sqlalchemy.select(Checkpoint).where(Checkpoint.owner == owner)
        return self._page(mine if run is None else mine.where(Checkpoint.run == run), Checkpoint.number, limit, offset)

    def find(self, path: str, owner: str) -> Checkpoint:
        """Refused (404) where there is none, it has expired or is another's."""
        run, kind, name = parse(path)
        its = Checkpoint.run == run, Checkpoint.kind == kind, Checkpoint.name == name, Checkpoint.owner == owner
        with Session(self._engine, expire_on_commit=False) as session:
            found = session.scalar(sqlalchemy.select(Checkpoint).where(*its))
        if found is None or (found.expires_at is not None and found.expires_at <= self._clock()):
            raise Refused(f"there is no checkpoint {path}", param="path", code="checkpoint_not_found", status=404)
        return found

    def directory(self, checkpoint: Checkpoint) -> Path:
        return self._folder / checkpoint.folder

    def save(
        self,
        run: Run,
        kind: str,
        name: str,
        write: Callable[[Path], None],
        size_of: Callable[[Path], int],
        ttl: int | None = None,
        metadata: Any = None,
        overwrite: bool = False,
    ) -> Checkpoint:
        """A new checkpoint of what `write` writes to a directory, which is there once all of it is.

        Raises:
          Refused: there is one of this name and it is not to be replaced, or the key's quota is used up.
        """
        check_name(name)
        check_ttl(ttl)
        now = int(self._clock())
        row = {"owner": run.owner, "run": run.id, "kind": kind, "name": name, "shape": run.shape}
        row |= {"user_metadata": _text(metadata)}
        row |= {"base_model": run.base_model, "created_at": now, "expires_at": None if ttl is None else now + ttl}
        with Session(self._engine) as session:
            same = Checkpoint.run == run.id, Checkpoint.kind == kind, Checkpoint.name == name
            old = session.scalar(sqlalchemy.select(Checkpoint).where(*same))
            used = session.scalar(
                sqlalchemy.select(sqlalchemy.func.sum(Checkpoint.bytes)).where(Checkpoint.owner == run.owner)
            )
        if old is not None and not overwrite:
            raise Refused(
                f"there is a checkpoint {old.path}; use another name, delete it, or say overwrite", param="path"
            )
        if (used or 0) >= self._quota:
            raise Refused(
                f"your checkpoints have {used:,} bytes of {self._quota:,}; delete some, or save with ttl_seconds",
                code="quota_exceeded",
            )
        directory = self.new_directory()
        try:
            write(directory)
            row |= {"bytes": size_of(directory), "folder": directory.name}
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                if old is not None:
                    session.execute(sqlalchemy.delete(Checkpoint).where(Checkpoint.number == old.number))
                made = Checkpoint(**row)
                session.add(made)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(self.directory(old), ignore_errors=True)
        return made

    def new_directory(self) -> Path:
        """A path in the folder at which nothing has been yet; what no checkpoint has goes when a server begins."""
        return self._folder / secrets.token_hex(12)

    def delete(self, checkpoint: Checkpoint) -> None:
        with Session(self._engine) as session, session.begin():
            session.execute(sqlalchemy.delete(Checkpoint).where(Checkpoint.number == checkpoint.number))
        shutil.rmtree(self.directory(checkpoint), ignore_errors=True)

    def keep_for(self, checkpoint: Checkpoint, ttl: int | None) -> None:
        """From now on; None: until it is deleted."""
        check_ttl(ttl)
        until = None if ttl is None else int(self._clock()) + ttl
        with Session(self._engine) as session, session.begin():
            its = sqlalchemy.update(Checkpoint).where(Checkpoint.number == checkpoint.number)
            session.execute(its.values(expires_at=until))

    def expire(self) -> None:
        """Deletes checkpoints whose time is over."""
        with Session(self._engine, expire_on_commit=False) as session:
            old = session.scalars(sqlalchemy.select(Checkpoint).where(Checkpoint.expires_at <= int(self._clock())))
            over = list(old)
        for checkpoint in over:
            self.delete(checkpoint)

    def _one(self, kind: Any, id: str, owner: str, what: str) -> Any:
        with Session(self._engine, expire_on_commit=False) as session:
            found = session.scalar(sqlalchemy.select(kind).where(kind.id == id, kind.owner == owner))
        if found is None:
            raise Refused(f"there is no {what} {id!r}", code="not_found", status=404)
        return found

    def _page(self, chosen: Any, order: Any, limit: int, offset: int) -> tuple[Sequence[Any], int]:
        with Session(self._engine, expire_on_commit=False) as session:
            count = session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(chosen.subquery()))
            return list(session.scalars(chosen.order_by(order.desc()).limit(limit).offset(offset))), count or 0
