"""A server of jobs for tests: its application, with files and keys that are as simple as can be."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ftjax.hosted.refusals import Refused


class PlainFiles:
    """Files of a folder, NAME in FOLDER/OWNER/ID, as jobs use them; what is there stays there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._numbers = itertools.count(time.time_ns())

    def find(self, id: str, owner: str) -> SimpleNamespace:
        file = self.folder / owner / id
        if not file.is_dir():
            raise Refused(f"there is no file {id!r}", status=404)
        (inner,) = file.iterdir()
        purpose = "fine-tune-results" if inner.suffix == ".csv" else "fine-tune"
        purpose = "assistants" if inner.name == "other.jsonl" else purpose
        return SimpleNamespace(id=id, owner=owner, purpose=purpose, filename=inner.name, place=inner)

    def path(self, file: SimpleNamespace) -> Path:
        return file.place

    def write(self, owner: str, purpose: str, filename: str, chunks: Any) -> SimpleNamespace:
        id = f"file-{next(self._numbers)}"
        place = self.folder / owner / id / filename
        place.parent.mkdir(parents=True)
        place.write_bytes(b"".join(chunks))
        return self.find(id, owner)

    def add(self, rows: list[Any] | Path, owner: str = "alice", filename: str = "rows.jsonl") -> str:
        """The id of a file with these rows."""
        lines = rows.read_text() if isinstance(rows, Path) else "".join(json.dumps(row) + "\n" for row in rows)
        return self.write(owner, "fine-tune", filename, [lines.encode()]).id


def application(*routers: APIRouter) -> FastAPI:
    """With these routes; the key of a request is the name of its owner."""
    app = FastAPI(redirect_slashes=False)
    for router in routers:
        app.include_router(router)

    @app.middleware("http")
    async def owner(request: Request, go_on):
        request.state.owner = request.headers["Authorization"].removeprefix("Bearer ")
        return await go_on(request)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse(Refused(first["msg"], param=".".join(map(str, first["loc"][1:]))).body(), 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(Refused(error.detail).body(), error.status_code)

    return app


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL at which the application answers, on this machine only."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def client_of(url: str, owner: str = "alice") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=owner, max_retries=0) as client:
        yield client


def until(reached, seconds: float = 120.0):
    """What `reached` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
    return found
