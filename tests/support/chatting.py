"""A server of a small random model on a port of its own, and OpenAI's client for it."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openai
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ftjax import lora, tree
from ftjax.adapted import NONE, facts_of, load_model
from ftjax.assemble import Base
from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Served
from ftjax.models.params import abstract_params, logical_axes
from ftjax.weights.peft.adapter import write_adapter
from support.runs import write_model
from support.tiny import one_device


class Names:
    """What models' names stand for: the base, and adapters by their folders."""

    def __init__(self, base: str, adapters: Mapping[str, Path]):
        self._served = {base: Served(base, 1)} | {name: Served(name, 2, path) for name, path in adapters.items()}

    def find(self, name: str, owner: str) -> Served:
        if name not in self._served:
            raise Refused(f"The model {name!r} does not exist.", param="model", code="model_not_found", status=404)
        return self._served[name]

    def all(self, owner: str) -> list[Served]:
        return list(self._served.values())


def random_adapter(base: Base, path: Path, seed: int, rank: int = 4) -> Path:
    """A PEFT adapter of all linear layers, so large that it changes what the model says."""
    rng, params = np.random.default_rng(seed), abstract_params(base.model, one_device())
    paths = lora.find_targets("all-linear", lora.adaptable(tree.flatten(params)))
    leaves = tree.flatten(lora.abstract_adapters(params, logical_axes(base.model), paths, rank, one_device()))
    made = {
        at: np.ones(leaf.shape, np.float32)
        if at.endswith("scale")
        else (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for at, leaf in leaves.items()
    }
    write_adapter(path, tree.unflatten(made), base.model.spec, facts_of(base))
    return path


def tiny(root: Path, **changes) -> tuple[Base, tree.Tree]:
    """A random model of a directory, and the variables of the base alone."""
    base, variables = load_model(str(write_model(root / "model", **changes)), {}, "float32")
    return base, variables[NONE]


def application(*routers: APIRouter, owner: str = "key_1") -> FastAPI:
    """The routes with refusals in OpenAI's form, for one owner."""
    app = FastAPI()
    for router in routers:
        app.include_router(router)

    @app.exception_handler(Refused)
    def refused(request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    def invalid(request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(Refused(f"{where}: {first['msg']}", param=where or None).body(), 400)

    @app.exception_handler(HTTPException)
    def failed(request, error: HTTPException) -> JSONResponse:
        return JSONResponse(Refused(str(error.detail)).body(), error.status_code)

    class Owned:
        def __init__(self, app):
            self._app = app

        async def __call__(self, scope, receive, send):
            scope.setdefault("state", {})["owner"] = owner
            await self._app(scope, receive, send)

    app.add_middleware(Owned)
    return app


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The URL of a server of it, which ends with the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def client(url: str, **options) -> openai.OpenAI:
    """OpenAI's own, which says at once what it is told; close it."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", **({"max_retries": 0, "timeout": 120} | options))
