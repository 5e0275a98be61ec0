"""Hundreds of wrong requests: each is told what is wrong with it, and none is a failure of the server."""

import json
import random

import httpx
import pytest
from support.chatting import Names, application, serving, tiny

from ftjax.hosted import chat, completions
from ftjax.hosted.generation import Generation, Limits

GOOD = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Where is my order?"}],
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "n": 1,
        "seed": 1,
        "stop": ["a"],
        "logit_bias": {"7": 1},
        "logprobs": True,
        "top_logprobs": 0,
        "stream_options": None,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "user": "me",
        "store": False,
        "metadata": {},
    },
    "/v1/completions": {"model": "tiny", "prompt": "The lamp", "max_tokens": 1, "n": 1, "logprobs": 0, "best_of": 1},
}
SURROGATE = "\ud800"
VALUES = [
    *(None, True, False, 0, -1, 1, 1.5, 10**30, -(2**63), float("nan"), float("inf"), "", "a", "1", SURROGATE, "\x00"),
    *([], [None], [0], ["a", "b"], [[]], [["a"]], {}, {"a": 1}, {"type": "function"}, {"7": 1e9}, {"type": 3}),
    *([{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "nobody", "content": "a"}], [{"content": "a"}]),
    *([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{"role": ["user"]}]),
    *(
        [{"role": "tool", "content": "a"}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": SURROGATE}],
    ),
    *([{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": 3}], [{"type": "function"}]),
    *([{"role": "user", "content": "long " * 2000}], "long " * 2000, [{"role": {}, "content": {}}]),
    *(
        [{"type": "function", "function": {"name": "f", "parameters": 3}}],
        [{"type": "custom", "custom": {"name": "f"}}],
    ),
    *([{"type": "function", "function": {"name": SURROGATE}}], {"include_usage": "yes"}, {"include_usage": True}),
    *({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 3}}, {"type": "json_object", "a": 1}),
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
]
BODIES = [
    "",
    "null",
    "[]",
    "3",
    '"a"',
    "{",
    '{"model": "tiny"',
    "{'a': 1}",
    "\x00",
    "[" * 50_000,
    '{"a":' * 20_000,
    "{}",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    base, variables = tiny(tmp_path_factory.mktemp("malformed"))
    made = Generation(base, variables, Limits(slots=4, places=1, rank=1))
    names = Names("tiny", {})
    with serving(application(chat.routes(made, names), completions.routes(made, names))) as url:
        yield url
    assert made.open == 0
    made.close()


def changed(rng, good):
    """A request with one to three of its fields set to something else, or a field that there is not."""
    body = dict(good)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(
            [*good, "unknown", "functions", "audio", "max_completion_tokens", "suffix", "echo", "stream", SURROGATE, ""]
        )
        body[name] = rng.choice(VALUES)
        if rng.random() < 0.1:
            del body[name]
    return body


def check(answer, said):
    assert answer.status_code < 500, said
    if answer.status_code == 200:
        return False
    error = answer.json()["error"]
    assert error["message"], said
    assert error["type"] == "invalid_request_error", said
    return True


@pytest.mark.parametrize("path", GOOD)
def test_each_is_answered_or_told_what_is_wrong(url, path):
    rng, wrong = random.Random(0), 0
    with httpx.Client(base_url=url, timeout=120) as asks:
        assert not check(asks.post(path, json=GOOD[path]), "the good one")
        for _ in range(400):
            body = changed(rng, GOOD[path])
            text = json.dumps(body)
            wrong += check(asks.post(path, content=text, headers={"content-type": "application/json"}), text)
        for text in BODIES:
            assert check(asks.post(path, content=text, headers={"content-type": "application/json"}), text[:99])
        assert check(asks.post(path, content=b"\xff\xfe", headers={"content-type": "application/json"}), "no UTF-8")
        assert check(asks.post(path, data={"model": "tiny"}), "a form")
    assert wrong > 300
