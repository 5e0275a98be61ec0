"""Requests that nobody means: each is refused with a message, and none fails in the server."""

import itertools
import json

import httpx
import pytest
from support.jobs import serving
from support.plain_hosted import application, served

from ftjax.evals.graders import NOBODY
from ftjax.hosted.jobs import grading

ODD = (
    None,
    True,
    0,
    -1,
    1e300,
    10**40,
    "",
    " ",
    "x" * 5000,
    "ft:",
    "ü",
    [],
    [[]],
    {},
    {"a": {"a": []}},
    {"type": "dpo"},
)
GOOD = {
    "model": "tiny",
    "training_file": "file-1",
    "validation_file": "file-2",
    "suffix": "s",
    "seed": 1,
    "metadata": {"a": "b"},
    "hyperparameters": {"n_epochs": 1},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
    "integrations": [],
}
GRADER = {"type": "string_check", "name": "x", "input": "{{ item.a }}", "reference": "a", "operation": "eq"}
QUERIES = ("limit=0", "limit=x", "limit=101", "limit=1e9", "after=", "after=x", "after=%F0", "metadata=x")
QUERIES += ('metadata[a"b]=1', "metadata[]=", "metadata[a.b]=1", "metadata[$.a]=1", "metadata['a']=1", "metadata[?]=1")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """`ask(method, path, **options)` -> the response."""
    with (
        serving(tmp_path_factory.mktemp("server")) as server,
        httpx.Client(base_url=server.url, headers={"Authorization": "Bearer alice"}) as client,
    ):
        yield client.request


def refused(response):
    assert 400 <= response.status_code < 500
    assert response.status_code != 409
    assert response.json()["error"]["message"]


def test_bodies_of_jobs(ask):
    for key, value in itertools.product(GOOD, ODD):
        refused(ask("POST", "/fine_tuning/jobs", json=GOOD | {key: value}))
    for kind in ("supervised", "dpo", "reinforcement"):
        for value in ODD:
            refused(ask("POST", "/fine_tuning/jobs", json=GOOD | {"method": {"type": kind, kind: value}}))
            settings = {"hyperparameters": {"n_epochs": value, "batch_size": value}, "grader": GRADER}
            refused(ask("POST", "/fine_tuning/jobs", json=GOOD | {"method": {"type": kind, kind: settings}}))
    for body in (b"", b"{", b"[]", b"null", b'{"model": 1', b"\xff", json.dumps({"model": "\ud800"}).encode()):
        refused(ask("POST", "/fine_tuning/jobs", content=body, headers={"Content-Type": "application/json"}))


def test_queries_and_ids(ask):
    for query in QUERIES:
        found = ask("GET", f"/fine_tuning/jobs?{query}")
        assert found.status_code == 200 or refused(found) is None
    for id in ("x", "ftjob-", "%2e%2e%2f", "a%00b", "%F0", "ü" * 500, "'; drop table jobs"):
        for path in ("", "/events", "/checkpoints"):
            refused(ask("GET", f"/fine_tuning/jobs/{id}{path}"))
        for path in ("cancel", "pause", "resume"):
            refused(ask("POST", f"/fine_tuning/jobs/{id}/{path}"))
        refused(ask("GET", f"/models/{id}"))
        refused(ask("DELETE", f"/models/{id}"))
        refused(ask("GET", f"/fine_tuning/checkpoints/{id}/permissions"))


def test_bodies_of_graders():
    with served(application(grading.routes(NOBODY))) as url, httpx.Client(base_url=url) as client:
        headers = {"Authorization": "Bearer alice"}
        for key, value in itertools.product(GRADER, ODD):
            body = {"grader": GRADER | {key: value}, "model_sample": "x", "item": {"a": value}}
            for path in ("run", "validate"):
                sent = body if path == "run" else {"grader": body["grader"]}
                found = client.post(f"/fine_tuning/alpha/graders/{path}", json=sent, headers=headers)
                assert found.status_code == 200 or refused(found) is None
        for value in ODD:
            body = {"grader": GRADER, "model_sample": value, "item": value}
            found = client.post("/fine_tuning/alpha/graders/run", json=body, headers=headers)
            assert found.status_code == 200 or refused(found) is None
        for text in ('{"grader": NaN}', '{"grader": {"type": "multi", "name": NaN}}', '{"grader": {"a": "\\ud800"}}'):
            refused(client.post("/fine_tuning/alpha/graders/validate", content=text, headers=headers))
