"""/v1/files: what users upload and jobs write, each file of the key that it was made with.

A file lies in the folder under its id, which the server made up; what its owner calls it is only ever text. It is
written as it arrives, beside its place, and counts from its first byte against what its owner may have on the disk.
"""

import contextlib
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

import sqlalchemy
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Mapped, Session, mapped_column

from ftjax import atomic
from ftjax.data.read.spans import parse_object
from ftjax.errors import UserError
from ftjax.hosted import forms
from ftjax.hosted.database import Base
from ftjax.hosted.refusals import Refused
from ftjax.hosted.shares import Shares

# What may be uploaded; the server itself writes "fine-tune-results". The suffix is that of the file on the disk.
PURPOSES = {"fine-tune": ".jsonl", "user_data": ""}
RESULTS = "fine-tune-results"
_SUFFIXES = PURPOSES | {RESULTS: ".csv"}
# The client's other purposes belong to parts of OpenAI's interface that are not here.
_ELSEWHERE = {"assistants": "assistants", "batch": "batches", "evals": "evals", "vision": "assistants"}

_LONGEST_LINE = 32 * 2**20
_BLOCK = 2**20
# Of `Shares`: senders may be slow, and other requests, and other keys, do not wait for them.
WRITING = "uploads", 16, 4, 256


class File(Base):
    __tablename__ = "files"

    number: Mapped[int] = mapped_column(primary_key=True)  # in the order in which they were made
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    bytes: Mapped[int]
    filename: Mapped[str]
    purpose: Mapped[str]

    def shown(self) -> dict[str, Any]:
        """As OpenAI's client reads it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Limits(NamedTuple):
    """largest: bytes of one file; quota: bytes of all files of a key; kept: seconds until a file expires, 0: never."""

    largest: int = 512 * 2**20
    quota: int = 64 * 2**30
    kept: int = 0


class Quota:
    """The bytes that each key has on the disk, counted by the one process that writes there."""

    def __init__(self, most: int):
        self.most = most
        self.counts: list[Callable[[str], int]] = []  # bytes of an owner that are there when first asked for
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, owner: str, nbytes: int) -> None:
        """Refused (403, "quota_exceeded") where it would be more than the key may have."""
        self.count(owner)
        with self._lock:
            held = self._held[owner] + nbytes
            if held > self.most:
                raise Refused(
                    f"your key may have {atomic.size(self.most)} on this server and has "
                    f"{atomic.size(self._held[owner])}; delete files that you no longer need",
                    code="quota_exceeded",
                    status=403,
                )
            self._held[owner] = held

    def give(self, owner: str, nbytes: int) -> None:
        """Gives back what was taken, of an owner who was counted."""
        with self._lock:
            self._held[owner] -= nbytes

    def add(self, owner: str, nbytes: int) -> None:
        """Counts what nobody is to be refused, of an owner who was counted before it was there."""
        self.give(owner, -nbytes)

    def count(self, owner: str) -> None:
        """Counts what is there where that was not done yet: before any of it is removed."""
        with self._lock:
            if owner not in self._held:
                self._held[owner] = sum(count(owner) for count in self.counts)


class Files:
    """The files of all keys, in one folder.

    Rows are the truth: a file is there once it is whole and its row is written, and gone once the row is. What a kill
    left without a row is removed at the start.
    """

    def __init__(self, engine: sqlalchemy.Engine, folder: Path, limits: Limits = Limits()):  # noqa: B008
        self.engine, self.folder, self.limits = engine, Path(folder), limits
        self.quota = Quota(limits.quota)
        self.quota.counts.append(self._bytes_of)
        self.folder.mkdir(parents=True, exist_ok=True)
        with Session(engine) as session:
            known = set(session.scalars(sqlalchemy.select(File.id)))
        for path in self.folder.iterdir():
            if path.is_file() and path.name.partition(".")[0] not in known:
                path.unlink()

    def find(self, id: str, owner: str) -> File:
        """Refused (404) where there is no such file, it has expired, or it is another's."""
        with Session(self.engine, expire_on_commit=False) as session:
            return self._find(session, id, owner)

    def path(self, file: File) -> Path:
        return self.folder / f"{file.id}{_SUFFIXES[file.purpose]}"

    def write(
        self, owner: str, purpose: str, filename: str, chunks: Iterable[bytes], keep_for: int | None = None
    ) -> File:
        """A new file; nothing of it remains where it is refused.

        keep_for: seconds until it expires; None: as the limits say.

        Raises:
          Refused: it is too large, has rows that are no JSON objects, or its owner has no room left. For what jobs
            write there is room, and it counts.
        """
        of_server = purpose == RESULTS
        self.quota.count(owner)
        with self.arriving(owner, counted=not of_server) as arriving:
            for chunk in chunks:
                arriving.write(chunk)
            file = self.keep(arriving, purpose, filename, keep_for)
        if of_server:
            self.quota.add(owner, file.bytes)
        return file

    def arriving(
        self, owner: str, largest: int | None = None, counted: bool = True
    ) -> contextlib.AbstractContextManager["Arriving"]:
        """A file to write to, which `keep` makes one of the files.

        largest: bytes; None: as the limits say.
        counted: False where its bytes are counted already, as the parts that they come from.
        """
        id = f"file-{secrets.token_hex(12)}"
        return arriving(self.folder, id, owner, largest or self.limits.largest, self.quota if counted else None)

    def keep(
        self,
        arriving: "Arriving",
        purpose: str,
        filename: str,
        keep_for: int | None = None,
        also: Callable[[Session, File], None] = lambda session, file: None,
    ) -> File:
        """Makes a file of what has arrived.

        also: what is to be written in the same transaction.
        """
        now = int(time.time())
        seconds = self.limits.kept if keep_for is None else keep_for
        file = File(
            id=arriving.id,
            owner=arriving.owner,
            created_at=now,
            expires_at=now + seconds if seconds else None,
            bytes=arriving.bytes,
            filename=plain_name(filename),
            purpose=purpose,
        )
        arriving.handle.flush()
        if purpose == "fine-tune":
            check_rows(arriving.place)
        with arriving.placed(self.path(file)), Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.add(file)
            also(session, file)
        return file

    def delete(self, id: str, owner: str) -> None:
        """Refused (404) as `find`."""
        self.quota.count(owner)
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            file = self._find(session, id, owner)
            if not _deleted(session, file):  # another request, or its time, was quicker
                raise _absent(id, "file_id")
        self._remove([file])

    def list(
        self, owner: str, after: str | None, limit: int, order: str, purpose: str | None
    ) -> tuple[list[File], bool]:
        """(files, whether there are more of them), in the order in which they were made or its reverse."""
        with Session(self.engine, expire_on_commit=False) as session:
            wanted = sqlalchemy.select(File).where(File.owner == owner, _holds())
            if purpose is not None:
                wanted = wanted.where(File.purpose == purpose)
            if after is not None:
                last = self._find(session, after, owner, "after").number
                wanted = wanted.where(File.number > last if order == "asc" else File.number < last)
            wanted = wanted.order_by(File.number if order == "asc" else File.number.desc()).limit(limit + 1)
            found = list(session.scalars(wanted))
        return found[:limit], len(found) > limit

    def expire(self) -> None:
        """Removes what has expired."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            old = list(session.scalars(sqlalchemy.select(File).where(~_holds())))
            for file in old:
                self.quota.count(file.owner)
            gone = [file for file in old if _deleted(session, file)]
        self._remove(gone)

    def _remove(self, files: Iterable[File]) -> None:
        for file in files:
            self.path(file).unlink(missing_ok=True)
            self.quota.give(file.owner, file.bytes)

    def _find(self, session: Session, id: str, owner: str, param: str = "file_id") -> File:
        wanted = sqlalchemy.select(File).where(File.id == id, File.owner == owner, _holds())
        file = session.scalar(wanted) if re.fullmatch(r"file-[0-9a-f]{24}", id) else None
        if file is None:
            raise _absent(id, param)
        return file

    def _bytes_of(self, owner: str) -> int:
        total = sqlalchemy.select(sqlalchemy.func.sum(File.bytes)).where(File.owner == owner)
        with Session(self.engine) as session:
            return int(session.scalar(total) or 0)


@contextlib.contextmanager
def arriving(
    folder: Path, id: str, owner: str, largest: int, quota: Quota | None, param: str = "file"
) -> Iterator["Arriving"]:
    """A file to write to; what is not `placed` by the end of the block is gone, and not counted.

    param: the field of the form that it comes in.
    """
    file = Arriving(owner, id, atomic.beside(folder / id), largest, quota, param)
    try:
        with file.handle:
            yield file
    finally:
        file.place.unlink(missing_ok=True)
        if quota and file.bytes and not file.kept:
            quota.give(owner, file.bytes)


class Arriving:
    """A file of which a part is there.

    Attributes: id, bytes so far, md5 so far; place, where it is; kept, whether it has been placed.
    """

    def __init__(self, owner: str, id: str, place: Path, largest: int, quota: Quota | None, param: str):
        self.owner, self.id, self.place = owner, id, place
        self.handle = place.open("xb")
        self.bytes, self.md5, self.kept = 0, hashlib.md5(usedforsecurity=False), False
        self._largest, self._quota, self._param = largest, quota, param

    @contextlib.contextmanager
    def placed(self, path: Path) -> Iterator[None]:
        """Puts the file, synced, under its name, where it stays if the block, which writes its row, ends well."""
        self.handle.flush()
        atomic.sync(self.place)
        self.place.replace(path)
        atomic.sync(path.parent)
        try:
            yield
        except BaseException:  # whatever ended the block, a file without a row would stay for ever; it goes on
            path.unlink(missing_ok=True)
            raise
        self.kept = True

    def write(self, chunk: bytes) -> None:
        """Refused (413) where it grows too large, (403) where its owner has no room left."""
        if self.bytes + len(chunk) > self._largest:
            raise Refused(
                f"{self._param} is larger than {atomic.size(self._largest)}; divide it, or send parts (/v1/uploads)",
                param=self._param,
                code="file_too_large",
                status=413,
            )
        if self._quota:
            self._quota.take(self.owner, len(chunk))
        self.bytes += len(chunk)
        self.md5.update(chunk)
        self.handle.write(chunk)


def _deleted(session: Session, file: File) -> bool:
    """Deletes the row; whether it was this that did, so that its bytes are given back once."""
    return session.execute(sqlalchemy.delete(File).where(File.number == file.number)).rowcount == 1


def _absent(id: str, param: str) -> Refused:
    return Refused(f"there is no file {id!r}", param=param, code="not_found", status=404)


def _holds() -> sqlalchemy.ColumnElement[bool]:
    return sqlalchemy.or_(File.expires_at.is_(None), File.expires_at > int(time.time()))


def plain_name(filename: str) -> str:
    """What a file is called without folders; Refused where that is nothing to show."""
    name = re.split(r"[/\\]", filename)[-1]
    if not name or not name.isprintable() or len(name) > 255:
        raise Refused("the file's name must have 1 to 255 printable characters", param="filename")
    return name


def check_purpose(purpose: str | None) -> str:
    if purpose in PURPOSES:
        return purpose
    known = " or ".join(map(repr, PURPOSES))
    if purpose == RESULTS:
        raise Refused(f"files of the purpose {RESULTS!r} are written by jobs; upload {known}", param="purpose")
    if purpose in _ELSEWHERE:
        why = f"is of {_ELSEWHERE[purpose]}, which this server does not have"
        raise Refused(f"the purpose {purpose!r} {why}; it takes {known}", param="purpose")
    raise Refused(f"the purpose must be {known}, and is {purpose!r}", param="purpose")


def check_rows(path: Path) -> None:
    """Refused ("invalid_file_format") where a line is no JSON object, with its number; or where there is none."""
    rows = 0
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), b""), 1):
            if not line.strip():
                continue
            rows += 1
            try:
                if len(line) > _LONGEST_LINE:
                    raise UserError(f"line {number}: longer than {_LONGEST_LINE:,} bytes; divide the row")
                parse_object(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"line {number}")
            except UnicodeDecodeError as error:
                raise _unreadable(f"line {number}: not UTF-8") from error
            except UserError as error:
                raise _unreadable(str(error)) from error
    if not rows:
        raise _unreadable("the file has no rows; each line must be one JSON object")


def _unreadable(why: str) -> Refused:
    return Refused(f"the file is not JSON Lines: {why}", param="file", code="invalid_file_format")


def keep_for(anchor: Any, seconds: Any) -> int | None:
    """Seconds of `expires_after`, of which both are texts, numbers or None; Refused where they are not as OpenAI's."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise Refused("expires_after[anchor] must be 'created_at'", param="expires_after[anchor]")
    if not re.fullmatch(r"[0-9]{1,9}", str(seconds)) or not 3600 <= int(seconds) <= 30 * 24 * 3600:
        raise Refused(
            "expires_after[seconds] must be from 3600 (an hour) to 2592000 (30 days)", param="expires_after[seconds]"
        )
    return int(seconds)


def routes(files: Files) -> APIRouter:
    router, writing = APIRouter(), Shares(*WRITING)

    @router.post("/v1/files")
    async def create(request: Request) -> dict[str, Any]:
        return await writing.run(request.state.owner, _create, files, request)

    @router.get("/v1/files")
    def list_files(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Literal["fine-tune", "fine-tune-results", "user_data"] | None = None,
    ) -> dict[str, Any]:
        found, more = files.list(request.state.owner, after, limit, order, purpose)
        return page([file.shown() for file in found], more)

    @router.get("/v1/files/{file_id}")
    def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        return files.find(file_id, request.state.owner).shown()

    @router.get("/v1/files/{file_id}/content")
    def content(request: Request, file_id: str) -> StreamingResponse:
        file = files.find(file_id, request.state.owner)
        try:
            handle = files.path(file).open("rb")  # kept open: it may be deleted while it is read
        except FileNotFoundError as error:
            raise _absent(file_id, "file_id") from error

        def blocks() -> Iterator[bytes]:
            with handle:
                yield from iter(lambda: handle.read(_BLOCK), b"")

        headers = {
            "Content-Length": str(file.bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename)}",
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(blocks(), media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}")
    def delete(request: Request, file_id: str) -> dict[str, Any]:
        files.delete(file_id, request.state.owner)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


def page(shown: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A list as OpenAI's client pages through it."""
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, "has_more": more, **ends}


def _create(files: Files, request: Request) -> dict[str, Any]:
    with files.arriving(request.state.owner) as arriving:
        content_type = request.headers.get("content-type", "")
        form = forms.read(content_type, forms.received(request), "file", arriving.write)
        fields = dict(form.fields)
        purpose = check_purpose(fields.pop("purpose", None))
        seconds = keep_for(fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None))
        if fields:
            name = next(iter(fields))
            raise Refused(f"unknown parameter {name!r}", param=name, code="unknown_parameter")
        return files.keep(arriving, purpose, form.filename, seconds).shown()
