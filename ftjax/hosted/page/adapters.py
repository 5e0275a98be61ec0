"""GET /v1/ftjax/models/{name}/adapter: the PEFT folder of a model as a zip, written as it is sent."""

import contextlib
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Models

_BLOCK = 2**20


def routes(models: Models) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/ftjax/models/{name:path}/adapter")
    def adapter(name: str, request: Request) -> StreamingResponse:
        served = models.find(name, request.state.owner)
        if served.adapter is None:
            raise Refused(f"{name} is the base of all models here; it has no adapter", param="model")
        files = _opened(served.adapter)
        if not files:
            raise Refused(f"there is no model {name!r}", param="model", code="model_not_found", status=404)
        title = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        headers = {
            "Content-Disposition": f'attachment; filename="{title}.zip"',
            "X-Content-Type-Options": "nosniff",
        }
        return StreamingResponse(_zipped(files), media_type="application/zip", headers=headers)

    return router


def _opened(folder: Path) -> dict[str, BinaryIO]:
    """{path in the folder: the file}, all opened at once: the model may be deleted while they are read.

    Only what lies in the folder itself: links are left out.
    """
    files: dict[str, BinaryIO] = {}
    with contextlib.ExitStack() as held:
        for place, _, names in os.walk(folder):
            for name in sorted(names):
                path = Path(place) / name
                with contextlib.suppress(OSError):  # O_NOFOLLOW: a link
                    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
                    held.enter_context(handle)
                    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
                        files[str(path.relative_to(folder))] = handle
        if files:
            held.pop_all()
    return files


def _zipped(files: dict[str, BinaryIO]) -> Iterator[bytes]:
    """The bytes of a zip. Stored, as weights do not become smaller."""
    pieces = _Pieces()
    with contextlib.ExitStack() as held, zipfile.ZipFile(pieces, "w") as archive:
        for handle in files.values():
            held.enter_context(handle)
        for name, handle in files.items():
            entry = zipfile.ZipInfo(name)
            entry.file_size = os.fstat(handle.fileno()).st_size  # by which it chooses the form for large files
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w") as out:
                while block := handle.read(_BLOCK):
                    out.write(block)
                    yield pieces.take()
        archive.close()
        yield pieces.take()


class _Pieces:
    """A file that is only written to, and gives what was written since it was last asked."""

    def __init__(self):
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def flush(self) -> None: ...

    def take(self) -> bytes:
        out = bytes(self._held)
        self._held.clear()
        return out
