"""The application: the routes of all parts behind one gate, and every error in OpenAI's form."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import sqlalchemy
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from ftjax import atomic
from ftjax.errors import TransientError, UserError
from ftjax.hosted.gate import Gate, Rules, answer
from ftjax.hosted.logs import log
from ftjax.hosted.refusals import Refused

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create(
    *parts: APIRouter,
    engine: sqlalchemy.Engine,
    rules: Rules,
    registry: CollectorRegistry,
    lifespan: Lifespan | None = None,
    lacks: Callable[[], str] | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
      parts: the routes, whose functions find the id of the asking key in `request.state.owner`.
      registry: of the metrics, which parts may add theirs to.
      lifespan: what runs beside the requests, from the start to the end.
      lacks: what else is wrong, for /healthz; "" where nothing is.
    """
    # Descriptions of the routes, and redirects to paths with another slash, are nothing that clients use.
    app = FastAPI(openapi_url=None, redirect_slashes=False, lifespan=lifespan, dependencies=[Depends(_storable)])
    for part in parts:
        app.include_router(part)
    app.include_router(_own(engine, registry, lacks or str))
    for kind in (Refused, RequestValidationError, HTTPException, UserError, OSError):
        app.add_exception_handler(kind, _refuse)
    app.add_middleware(Gate, rules=rules, registry=registry)
    return app


async def _storable(request: Request) -> None:
    """Refuses text that UTF-8 or PostgreSQL cannot hold, wherever in a request: half a surrogate pair, and NUL.

    JSON can spell both, and what keeps or answers it would fail.
    """
    # The body where a route had it read as JSON; of others nothing is read here.
    left: list[Any] = [vars(request).get("_json"), request.path_params, dict(request.query_params.multi_items())]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise Refused("the request has a text with the character NUL (U+0000); leave it out")
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise Refused("the request has a text with half of a surrogate pair; send whole characters")
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def _own(engine: sqlalchemy.Engine, registry: CollectorRegistry, lacks: Callable[[], str]) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    def healthy() -> dict[str, str]:
        try:
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text("SELECT 1"))
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise Refused("the database does not answer", status=503) from error
        if wrong := lacks():
            raise Refused(wrong, status=503)
        return {"status": "ok"}

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif isinstance(error, HTTPException):
        error = _of_framework(error, request)
    elif isinstance(error, OSError):
        if error.errno not in atomic.FULL:
            raise error
        log.error("the disk is full")
        error = Refused("the server's disk is full; try again once there is room", code="disk_full", status=503)
    elif isinstance(error, UserError):
        error = Refused(str(error), status=503 if isinstance(error, TransientError) else 400)
    return answer(error)


def _invalid(error: RequestValidationError) -> Refused:
    """The first of what a request's values should be otherwise, with the name of the parameter."""
    first: dict[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    where, *place = first["loc"]
    param = ".".join(map(str, place)) or None
    if param is None:
        return Refused(f"the {where}: {first['msg']}; send a JSON object, with Content-Type: application/json")
    if first["type"] == "missing":
        return Refused(f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Refused(f"unknown parameter {param!r}", param=param, code="unknown_parameter")
    return Refused(f"{param}: {first['msg']}", param=param, code="invalid_value")


def _of_framework(error: HTTPException, request: Request) -> Refused:
    """Paths and methods that there are none of, bodies that are too large or cannot be read."""
    status, path = error.status_code, request.url.path
    texts = {404: f"there is nothing at {path}", 405: f"{path} cannot be asked by {request.method}"}
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}
    text = texts.get(status, str(error.detail))
    return Refused(text, code=codes.get(status), status=status, headers=error.headers)
