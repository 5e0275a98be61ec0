"""Who is let in, how often, with how much; what is written down of it; and what errors look like."""

import contextlib
import io
import json
import logging
import re
import socket
import time

import httpx
import openai
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field
from support.hosted import hosted, running

from ftjax.errors import UserError
from ftjax.hosted import app, logs
from ftjax.hosted.database import connect
from ftjax.hosted.gate import Rates, Rules
from ftjax.hosted.refusals import Refused


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    seed: int = Field(0, ge=0)


def routes():
    router = APIRouter()

    @router.post("/v1/things/{thing_id}")
    def make(request: Request, thing_id: str, asked: Asked) -> dict:
        return {"id": thing_id, "owner": request.state.owner, "model": asked.model}

    @router.get("/v1/broken")
    def broken() -> dict:
        raise RuntimeError("of the server, not of the request")

    @router.get("/v1/refused")
    def refused() -> dict:
        raise Refused("no such model", param="model", code="model_not_found", status=404)

    @router.get("/v1/mistake")
    def mistake() -> dict:
        raise UserError("config.x: is wrong")

    @router.get("/v1/breaks_off")
    def breaks_off() -> StreamingResponse:
        def pieces():
            yield b"begun"
            raise RuntimeError("too late to say so")

        return StreamingResponse(pieces())

    return router


@contextlib.contextmanager
def served(tmp_path, **rules):
    engine = connect(f"sqlite:///{tmp_path / 'gate.db'}")
    rules = Rules({"sk-anna": "key_anna", "sk-ben": "key_ben"}.get, **rules)
    application = app.create(routes(), engine=engine, rules=rules, registry=CollectorRegistry())
    with running(application) as url, httpx.Client(base_url=url, headers={"Authorization": "Bearer sk-anna"}) as client:
        yield client
    engine.dispose()


@pytest.fixture
def client(tmp_path):
    with served(tmp_path, largest=1000) as client:
        yield client


def error_of(response, status):
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert re.fullmatch(r"req_[0-9a-f]{24}", response.headers["x-request-id"])
    return error


def test_a_route_is_told_whose_key_asks(client):
    response = client.post("/v1/things/x", json={"model": "m"})
    assert response.json() == {"id": "x", "owner": "key_anna", "model": "m"}
    again = client.post("/v1/things/x", json={"model": "m"}, headers={"Authorization": "bearer sk-ben"})
    assert again.json()["owner"] == "key_ben"
    tinker = httpx.get(client.base_url.join("/v1/refused"), headers={"X-API-Key": "sk-ben"})
    assert tinker.status_code == 404
    assert response.headers["x-request-id"] != again.headers["x-request-id"]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer sk-else", "Basic sk-anna", "sk-anna", "Bearer \xff"])
def test_without_a_key_that_holds_there_is_nothing(client, header):
    for path in ("/v1/refused", "/v1/nowhere", "/metrics", "/"):
        response = client.get(path, headers={"Authorization": header.encode("latin-1")})
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/healthz", headers={"Authorization": header.encode("latin-1")}).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("ask", "status", "wanted"),
    [
        (("GET", "/v1/nowhere"), 404, ("invalid_request_error", None, "unknown_url")),
        (("GET", "/v1/refused/"), 404, ("invalid_request_error", None, "unknown_url")),
        (("DELETE", "/v1/refused"), 405, ("invalid_request_error", None, "method_not_allowed")),
        (("GET", "/v1/refused"), 404, ("invalid_request_error", "model", "model_not_found")),
        (("GET", "/v1/mistake"), 400, ("invalid_request_error", None, None)),
        (("GET", "/v1/broken"), 500, ("server_error", None, None)),
    ],
)
def test_every_error_has_one_form(client, ask, status, wanted):
    error = error_of(client.request(*ask), status)
    assert (error["type"], error["param"], error["code"]) == wanted
    assert "Traceback" not in error["message"]
    assert "of the server" not in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        (b'{"model": "m", "seed": -1}', "seed", "invalid_value", "greater than or equal to 0"),
        (b'{"seed": 1}', "model", "missing_required_parameter", "model is missing"),
        (b'{"model": "m", "sed": 1}', "sed", "unknown_parameter", "unknown parameter 'sed'"),
        (b'{"model": {}}', "model", "invalid_value", "valid string"),
        (b'{"model": "\\ud800"}', None, None, "half of a surrogate pair"),
        (b'{"\\udfff": 1, "model": "m"}', None, None, "half of a surrogate pair"),
        (b'{"model": "m", "more": {"a": [["\\u0000"]]}}', None, None, "NUL"),
        (b'{"model": ', None, None, "not JSON: Expecting value at character"),
        (b"[1]", None, None, "send a JSON object"),
        (b"", None, None, "send a JSON object"),
        (b'{"model": "\xff"}', None, None, "parsing the body"),
        (b"[" * 900, None, None, "not JSON"),
        (b'{"model": "m", "seed": 1e999}', "seed", "invalid_value", "seed"),
        (b'{"model": "m", "seed": NaN}', "seed", "invalid_value", "seed"),
    ],
)
def test_bodies_that_are_not_as_they_must_be_name_the_parameter(client, body, param, code, message):
    response = client.post("/v1/things/x", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]


def test_bodies_are_bounded_announced_or_not(client):
    large = b'{"model": "' + b"m" * 1000 + b'"}'
    for content in (large, iter([large[:500], large[500:]]), b"x" * 2**24):
        response = client.post("/v1/things/x", content=content, headers={"Content-Type": "application/json"})
        assert error_of(response, 413)["code"] == "body_too_large"


def test_a_key_that_asks_too_often_is_told_when_to_go_on(tmp_path):
    with served(tmp_path, per_minute=3) as client:
        statuses = [client.get("/v1/refused").status_code for _ in range(3)]
        late = client.get("/v1/refused")
        assert statuses == [404, 404, 404]
        assert error_of(late, 429)["type"] == "rate_limit_error"
        assert 1 <= int(late.headers["retry-after"]) <= 20
        assert client.get("/v1/refused", headers={"Authorization": "Bearer sk-ben"}).status_code == 404
        assert client.get("/healthz").status_code == 200


def test_the_rate_fills_up_evenly():
    now = [0.0]
    rates = Rates(60, clock=lambda: now[0])
    for _ in range(60):
        rates.take("key")
    with pytest.raises(Refused):
        rates.take("key")
    now[0] = 2.0
    rates.take("key")
    rates.take("key")
    with pytest.raises(Refused) as refused:
        rates.take("key")
    assert refused.value.headers == {"Retry-After": "1"}
    now[0] = 1e6
    for _ in range(60):
        rates.take("key")
    with pytest.raises(Refused):
        rates.take("key")


def test_other_names_of_the_host_are_refused(tmp_path):
    with served(tmp_path, hosts=("127.0.0.1", "gpu.example")) as client:
        for host, status in (("gpu.example", 404), ("GPU.example:8000", 404), ("evil.example", 400), ("", 400)):
            assert client.get("/v1/refused", headers={"Host": host}).status_code == status
        assert error_of(client.get("/healthz", headers={"Host": "evil.example"}), 400)["code"] == "unknown_host"


def test_the_log_has_a_line_of_json_for_each_request_and_nothing_that_users_sent(client):
    stream = io.StringIO()
    logs.begin(stream)
    try:
        secret = "what-users-send"
        client.post(f"/v1/things/{secret}?q={secret}", json={"model": secret})
        client.post("/v1/things/x", json={"model": secret, secret: secret})
        client.get(f"/{secret}")
        broken = client.get("/v1/broken")
        with contextlib.suppress(httpx.RemoteProtocolError):
            client.get("/v1/breaks_off")
    finally:
        for name in logs.LEVELS:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True
    text = stream.getvalue()
    assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/v1/things/{thing_id}", 200),
        ("POST", "/v1/things/{thing_id}", 400),
        ("GET", "", 404),
        ("GET", "/v1/broken", 500),
        ("GET", "/v1/breaks_off", 200),
    ]
    assert all(line["key"] == "key_anna" and line["seconds"] >= 0 for line in requests)
    failed = next(line for line in lines if line["event"] == "failed")
    assert failed["request_id"] == broken.headers["x-request-id"] == requests[3]["request_id"]
    assert "RuntimeError: of the server" in failed["traceback"]


def test_the_metrics_count_requests_by_their_routes(client):
    client.post("/v1/things/x", json={"model": "m"})
    client.post("/v1/things/y", json={"model": "m"})
    client.request("BREW", "/v1/refused")
    text = client.get("/metrics").text
    assert 'ftjax_requests_total{method="POST",route="/v1/things/{thing_id}",status="200"} 2.0' in text
    assert 'ftjax_requests_total{method="other",route="/v1/refused",status="405"} 1.0' in text
    assert 'ftjax_request_seconds_count{route="/v1/things/{thing_id}"} 2.0' in text
    assert "ftjax_open_requests 1.0" in text


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(tmp_path):
    with hosted(tmp_path / "serve") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:
            head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.key('anna')}\r\n"
            head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
            sock.sendall(head.encode() + b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"y" * 5000)
        assert server.client().files.list().data == []
        _until(lambda: not list(server.files.folder.iterdir()))
        _until(lambda: 'route="/v1/files",status="499"' in _metrics(server))


def test_the_official_client_reads_the_errors(tmp_path):
    with hosted(tmp_path / "serve", **{"limits.requests_per_minute": 2}) as server:
        with pytest.raises(openai.AuthenticationError, match="wrong or has been revoked"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0).files.list()
        client = server.client()
        client.files.list()
        with pytest.raises(openai.NotFoundError) as refused:
            client.files.retrieve("file-x")
        assert refused.value.request_id.startswith("req_")
        with pytest.raises(openai.RateLimitError, match="2 times a minute"):
            client.files.list()


def _metrics(server):
    return httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.key('anna')}"}).text


def _until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
