"""What every request passes before its route: a number, a host that is ours, a key, a rate, a bound on its body.

And what is written down of it: a line of the log and the metrics, neither of which has anything that users sent. It is
plain ASGI, so that bodies and answers stream through it.
"""

import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftjax import atomic
from ftjax.hosted.logs import log
from ftjax.hosted.refusals import Refused

OPEN = ("/healthz",)  # paths that need no key
GONE = 499  # in the log, of clients that did not wait for their answer
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
_SECONDS = (0.005, 0.025, 0.1, 0.5, 1, 2.5, 10, 30, 120, 600)  # answers that stream take minutes
_LINGER = 5  # seconds in which the rest of a refused body is read: a client that still sends would not see the answer


class Rules(NamedTuple):
    """Who may ask for what.

    owner: the id of the key with a secret, or None; it may take its time, a thread waits for it.
    hosts: names by which the server is addressed; "*" is all.
    per_minute: requests of a key; as many may come at once.
    largest: bytes of a body, and of those to the paths in `larger`, templates as of the routes.
    open: paths that need no key.
    """

    owner: Callable[[str], str | None]
    hosts: Collection[str] = ("127.0.0.1", "localhost", "[::1]")
    per_minute: int = 600
    largest: int = 16 * 2**20
    larger: Mapping[str, int] = {}
    open: Collection[str] = OPEN


class Rates:
    """How fast each key may ask: a bucket that holds a minute's requests and fills up evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._most, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key: (requests left, at that time)
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """Refused (429) where none is left, with the seconds until the next one."""
        with self._lock:
            now = self._clock()
            left, then = self._buckets.get(key, (float(self._most), now))
            left = min(self._most, left + (now - then) * self._most / 60)
            enough = left >= 1
            self._buckets[key] = (left - enough, now)
        if not enough:
            seconds = math.ceil((1 - left) * 60 / self._most)
            raise Refused(
                f"your key may ask {self._most} times a minute; try again in {seconds} s",
                code="rate_limit_exceeded",
                status=429,
                headers={"Retry-After": str(seconds)},
            )


class Gate:
    """The middleware; see the module."""

    def __init__(self, app: ASGIApp, rules: Rules, registry: CollectorRegistry):
        self._app, self._rules, self._rates = app, rules, Rates(rules.per_minute)
        # Not the threads of the routes, which may all be at work.
        self._threads = anyio.CapacityLimiter(4)
        labels = ("method", "route", "status")
        self._requests = Counter("ftjax_requests", "Requests answered", labels, registry=registry)
        text = "Until the end of the answer"
        self._seconds = Histogram("ftjax_request_seconds", text, ("route",), buckets=_SECONDS, registry=registry)
        self._open = Gauge("ftjax_open_requests", "Requests that are being answered", registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._rules)
        self._open.inc()
        try:
            await self._answer(scope, exchange)
        finally:
            self._open.dec()
            self._record(scope, exchange)

    async def _answer(self, scope: Scope, exchange: "_Exchange") -> None:
        try:
            headers = Headers(scope=scope)
            _check_host(headers.get("host", ""), self._rules.hosts)
            if scope["path"] not in self._rules.open:
                exchange.owner = scope["state"]["owner"] = await self._owner(headers)
                self._rates.take(exchange.owner)
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = exchange.status or GONE
        except Refused as refused:
            await exchange.refuse(scope, refused)
        except Exception:  # the last place that sees it: logged whole, and answered without its words
            log.exception("failed", extra={"fields": {"request_id": exchange.id}})
            if exchange.status is not None:  # the answer had begun, and cannot be taken back
                raise
            text = f"the server failed; its log has more under the request id {exchange.id}"
            await exchange.refuse(scope, Refused(text, status=500))

    async def _owner(self, headers: Headers) -> str:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get("x-api-key", "")  # as Tinker's client sends it
        if not secret.strip():
            raise Refused(
                "this needs an API key; send the header Authorization: Bearer KEY",
                code="missing_api_key",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        owner = await anyio.to_thread.run_sync(self._rules.owner, secret.strip(), limiter=self._threads)
        if owner is None:
            raise Refused(
                "the API key is wrong or has been revoked",
                code="invalid_api_key",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return owner

    def _record(self, scope: Scope, exchange: "_Exchange") -> None:
        seconds = time.monotonic() - exchange.began
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route, status = template(scope), exchange.status or GONE
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "key": exchange.owner,
            "request_id": exchange.id,
        }
        log.info("request", extra={"fields": fields})


def template(scope: Scope) -> str:
    """The path of the route that a request went to, as it is written in the code; "" where there is none."""
    return getattr(scope.get("route"), "path", "")


class _Exchange:
    """One request and its answer: what goes in and out passes here."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, rules: Rules):
        self.id, self.began = f"req_{secrets.token_hex(12)}", time.monotonic()
        self.owner: str | None = None
        self.status: int | None = None
        scope.setdefault("state", {})["request_id"] = self.id
        self._scope, self._receive, self._send, self._rules = scope, receive, send, rules
        self._read, self._whole = 0, False

    async def receive(self) -> Message:
        """The next piece of the body; 413 where there is too much of it, by its announced length if it has one."""
        most = self._rules.larger.get(template(self._scope), self._rules.largest)
        announced = Headers(scope=self._scope).get("content-length", "")
        if not self._read and announced.isdecimal() and int(announced) > most:
            raise _too_large(most)
        message = await self._next()
        if self._read > most:
            raise _too_large(most)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
            if self.status >= 400 and not self._whole:
                await self._read_on()
        await self._send(message)

    async def refuse(self, scope: Scope, refused: Refused) -> None:
        if self.status is None:
            await answer(refused)(scope, self._receive, self.send)

    async def _next(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def _read_on(self) -> None:
        with anyio.move_on_after(_LINGER):
            while not self._whole:
                await self._next()


def answer(refused: Refused) -> JSONResponse:
    return JSONResponse(_encodable(refused.body()), refused.status, dict(refused.headers))


def _encodable(body: Any) -> Any:
    """With what JSON in UTF-8 cannot hold, half a surrogate pair in what a user sent, as a question mark."""
    if isinstance(body, str):
        return body.encode(errors="replace").decode()
    return {name: _encodable(value) for name, value in body.items()} if isinstance(body, dict) else body


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body may have {atomic.size(most)} and has more")


def _check_host(host: str, hosts: Collection[str]) -> None:
    """Refused where a request is for another name: a page of elsewhere whose name leads here is not served."""
    name = re.sub(r":[0-9]+$", "", host).lower()
    if "*" not in hosts and name not in hosts:
        raise Refused("this server does not go by that name; add it to config.hosts", code="unknown_host")
