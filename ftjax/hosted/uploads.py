"""/v1/uploads: a large file in parts, which may come in any order and again, put together once all are there."""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Mapped, Session, mapped_column

from ftjax import atomic
from ftjax.hosted import forms
from ftjax.hosted.database import Base
from ftjax.hosted.files import WRITING, Arriving, File, Files, arriving, check_purpose, keep_for, plain_name
from ftjax.hosted.refusals import Refused
from ftjax.hosted.shares import Shares

PART = 64 * 2**20  # bytes of a part at most, which is what OpenAI's client sends
_EXPIRES = 3600  # seconds
_BLOCK = 2**20
_LOCKS = 64
_MOST_PARTS = 10_000
_REMEMBERED = 24 * 3600  # seconds after which an upload that has ended is forgotten


class Upload(Base):
    __tablename__ = "uploads"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    expires_at: Mapped[int]
    bytes: Mapped[int]
    filename: Mapped[str]
    purpose: Mapped[str]
    keep_for: Mapped[int | None]  # seconds that the file is kept
    status: Mapped[str]  # pending, completed, cancelled, expired
    file_id: Mapped[str | None]

    def shown(self) -> dict[str, Any]:
        """As OpenAI's client reads it."""
        return {
            "id": self.id,
            "object": "upload",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "file": None,
        }


class Part(Base):
    __tablename__ = "upload_parts"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    upload_id: Mapped[str] = mapped_column(sqlalchemy.ForeignKey("uploads.id"), index=True)
    created_at: Mapped[int]
    bytes: Mapped[int]

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "upload.part",
            "created_at": self.created_at,
            "upload_id": self.upload_id,
        }


class _ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: str
    seconds: int


class Begun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=1)]
    filename: str
    mime_type: str
    purpose: str
    expires_after: _ExpiresAfter | None = None


class Complete(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class Uploads:
    """The uploads of all keys, whose parts lie in one folder until they are a file.

    Parts count against what their owner may have on the disk. Whatever was begun is gone an hour later.
    """

    def __init__(self, files: Files, folder: Path, largest: int):
        """largest: bytes of a file."""
        self._files, self._folder, self._largest = files, Path(folder), largest
        # One of them is held where an upload changes, so that no part comes while it is put together.
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        files.quota.counts.append(self._bytes_of)
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._session() as session:
            known = set(session.scalars(sqlalchemy.select(Part.id)))
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()

    def begin(self, owner: str, asked: Begun) -> Upload:
        if asked.bytes > self._largest:
            raise Refused(
                f"an upload may have {atomic.size(self._largest)}, and this one {atomic.size(asked.bytes)}",
                param="bytes",
                code="file_too_large",
                status=413,
            )
        # Whether there is room; it is taken as parts arrive.
        self._files.quota.take(owner, asked.bytes)
        self._files.quota.give(owner, asked.bytes)
        after = asked.expires_after
        now = int(time.time())
        upload = Upload(
            id=f"upload_{secrets.token_hex(12)}",
            owner=owner,
            created_at=now,
            expires_at=now + _EXPIRES,
            bytes=asked.bytes,
            filename=plain_name(asked.filename),
            purpose=check_purpose(asked.purpose),
            keep_for=keep_for(after and after.anchor, after and after.seconds),
            status="pending",
        )
        with self._session() as session, session.begin():
            session.add(upload)
        return upload

    @contextlib.contextmanager
    def arriving(self, id: str, owner: str) -> Iterator[Arriving]:
        """A part to write to, which `add` makes one of the upload."""
        with self._session() as session:
            self._pending(session, id, owner)
        part = f"part_{secrets.token_hex(12)}"
        with arriving(self._folder, part, owner, PART, self._files.quota, "data") as file:
            yield file

    def add(self, id: str, arriving: Arriving) -> Part:
        if not arriving.bytes:
            raise Refused("the part is empty", param="data")
        part = Part(
            id=arriving.id,
            owner=arriving.owner,
            upload_id=id,
            created_at=int(time.time()),
            bytes=arriving.bytes,
        )
        with self._lock(id), arriving.placed(self._folder / part.id), self._session() as session, session.begin():
            upload = self._pending(session, id, arriving.owner)
            parts = self._parts(session, id)
            # One part more than is needed: a client that has not got its answer sends the part again.
            if len(parts) == _MOST_PARTS or sum(one.bytes for one in parts) + part.bytes > upload.bytes + PART:
                raise Refused(f"the parts are more than the {upload.bytes:,} bytes of the upload", param="data")
            session.add(part)
        return part

    def complete(self, id: str, owner: str, asked: Complete) -> tuple[Upload, File]:
        """Puts the parts together; once that is done the same again, for a client that has not got its answer."""
        with self._lock(id):
            with self._session() as session:
                upload = self._find(session, id, owner)
                if upload.status == "completed":
                    return upload, self._files.find(upload.file_id, owner)
                self._pending(session, id, owner)
                parts = self._parts(session, id)
            chosen = _in_order(parts, asked.part_ids, upload)
            with self._files.arriving(owner, upload.bytes, counted=False) as whole:
                for part in chosen:
                    with (self._folder / part.id).open("rb") as handle:
                        for block in iter(lambda: handle.read(_BLOCK), b""):
                            whole.write(block)
                if asked.md5 is not None and whole.md5.hexdigest() != asked.md5.lower():
                    raise Refused(f"the md5 of the parts is {whole.md5.hexdigest()}", param="md5", code="md5_mismatch")

                def finish(session: Session, file: File) -> None:
                    session.execute(sqlalchemy.delete(Part).where(Part.upload_id == id))
                    done = {"status": "completed", "file_id": file.id}
                    session.execute(sqlalchemy.update(Upload).where(Upload.id == id).values(done))

                self._files.quota.count(owner)
                file = self._files.keep(whole, upload.purpose, upload.filename, upload.keep_for, finish)
            self._remove(parts)
            self._files.quota.add(owner, file.bytes)
            upload.status, upload.file_id = "completed", file.id
        return upload, file

    def cancel(self, id: str, owner: str) -> Upload:
        with self._lock(id):
            return self._end(id, owner, "cancelled")

    def expire(self) -> None:
        """Ends uploads whose time is over; forgets those that ended long ago."""
        now = int(time.time())
        late = sqlalchemy.select(Upload.id, Upload.owner).where(Upload.status == "pending", Upload.expires_at <= now)
        with self._session() as session:
            found = list(session.execute(late))
        for id, owner in found:
            with self._lock(id), contextlib.suppress(Refused):  # completed in the meantime
                self._end(id, owner, "expired")
        over = sqlalchemy.delete(Upload).where(Upload.status != "pending", Upload.expires_at <= now - _REMEMBERED)
        with self._session() as session, session.begin():
            session.execute(over)

    def _end(self, id: str, owner: str, status: str) -> Upload:
        self._files.quota.count(owner)
        with self._session() as session, session.begin():
            upload = self._find(session, id, owner)
            if upload.status != "pending":
                raise _over(upload)
            upload.status = status
            parts = self._parts(session, id)
            for part in parts:
                session.delete(part)
        self._remove(parts)
        return upload

    def _remove(self, parts: Iterable[Part]) -> None:
        for part in parts:
            (self._folder / part.id).unlink(missing_ok=True)
            self._files.quota.give(part.owner, part.bytes)

    def _find(self, session: Session, id: str, owner: str) -> Upload:
        upload = session.scalar(sqlalchemy.select(Upload).where(Upload.id == id, Upload.owner == owner))
        if upload is None:
            raise Refused(f"there is no upload {id!r}", param="upload_id", code="not_found", status=404)
        return upload

    def _pending(self, session: Session, id: str, owner: str) -> Upload:
        upload = self._find(session, id, owner)
        if upload.status != "pending" or upload.expires_at <= time.time():
            raise _over(upload)
        return upload

    def _parts(self, session: Session, id: str) -> list[Part]:
        return list(session.scalars(sqlalchemy.select(Part).where(Part.upload_id == id)))

    def _bytes_of(self, owner: str) -> int:
        total = sqlalchemy.select(sqlalchemy.func.sum(Part.bytes)).where(Part.owner == owner)
        with self._session() as session:
            return int(session.scalar(total) or 0)

    def _lock(self, id: str) -> threading.Lock:
        return self._locks[hash(id) % _LOCKS]

    def _session(self) -> Session:
        return Session(self._files.engine, expire_on_commit=False)


def _over(upload: Upload) -> Refused:
    status = "expired" if upload.status == "pending" else upload.status
    return Refused(f"the upload is {status}; begin another", param="upload_id", code="upload_not_pending")


def _in_order(parts: Sequence[Part], ids: Sequence[str], upload: Upload) -> list[Part]:
    """The parts that a client names; Refused where they are not those of the upload, or not its bytes."""
    by_id = {part.id: part for part in parts}
    for id in ids:
        if id not in by_id:
            raise Refused(f"the upload has no part {id!r}", param="part_ids", code="not_found")
    if len(set(ids)) < len(ids):
        raise Refused("a part stands there twice", param="part_ids")
    if (total := sum(by_id[id].bytes for id in ids)) != upload.bytes:
        raise Refused(
            f"the parts have {total:,} bytes, and the upload was begun for {upload.bytes:,}",
            param="part_ids",
            code="bytes_mismatch",
        )
    return [by_id[id] for id in ids]


def routes(uploads: Uploads) -> APIRouter:
    router, writing = APIRouter(), Shares(*WRITING)

    @router.post("/v1/uploads")
    def begin(request: Request, asked: Begun) -> dict[str, Any]:
        return uploads.begin(request.state.owner, asked).shown()

    @router.post("/v1/uploads/{upload_id}/parts")
    async def add(request: Request, upload_id: str) -> dict[str, Any]:
        return await writing.run(request.state.owner, _add, uploads, request, upload_id)

    @router.post("/v1/uploads/{upload_id}/complete")
    async def complete(request: Request, upload_id: str, asked: Complete) -> dict[str, Any]:
        owner = request.state.owner
        upload, file = await writing.run(owner, uploads.complete, upload_id, owner, asked)
        return upload.shown() | {"file": file.shown()}

    @router.post("/v1/uploads/{upload_id}/cancel")
    def cancel(request: Request, upload_id: str) -> dict[str, Any]:
        return uploads.cancel(upload_id, request.state.owner).shown()

    return router


def _add(uploads: Uploads, request: Request, id: str) -> dict[str, Any]:
    with uploads.arriving(id, request.state.owner) as arriving:
        form = forms.read(request.headers.get("content-type", ""), forms.received(request), "data", arriving.write)
        if form.fields:
            name = next(iter(form.fields))
            raise Refused(f"unknown parameter {name!r}", param=name, code="unknown_parameter")
        return uploads.add(id, arriving).shown()
