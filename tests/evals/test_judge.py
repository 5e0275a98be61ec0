"""Pairwise judges: both orders, ties, the endpoint's troubles, and a model here that prefers a letter."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import logits, numpy_params, one_device, spec

from ftjax import prompts
from ftjax.errors import TransientError, UserError
from ftjax.evals import judge as judges
from ftjax.evals.judge import Judge, win_rate
from ftjax.models.decoder import Decoder

TEMPLATE = "{prompt}|{a}|{b}"


def knowing(verdict):
    """A judge from (prompt, a, b) -> verdict."""
    return Judge(
        "someone", lambda questions, origins: [verdict(*question.split("|")) for question in questions], TEMPLATE
    )


def longer(prompt, a, b):
    return "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_a_verdict_counts_where_both_orders_agree():
    prompts, ours, theirs = ["p", "q", "r", "s"], ["long", "a", "same", "{a}"], ["x", "longer", "also", "{b}{prompt}"]
    found = win_rate(knowing(longer), prompts, ours, theirs)
    low, high = found.pop("interval")
    assert 0 <= low <= 0.375 <= high <= 1
    assert found == {
        "rate": (1 + 0.5) / 4,
        **{"wins": 1, "ties": 1, "losses": 2, "examples": 4, "inconsistent": 0.0, "first": 0.5},
        "outcomes": [1.0, 0.0, 0.5, 0.0],
    }


def test_a_judge_that_looks_at_positions_only_finds_ties():
    found = win_rate(knowing(lambda prompt, a, b: "A"), ["p"] * 3, ["x"] * 3, ["y"] * 3)
    assert (found["rate"], found["ties"], found["inconsistent"], found["first"]) == (0.5, 3, 1.0, 1.0)
    # one order a tie, the other not: no more than a tie either
    half = win_rate(knowing(lambda prompt, a, b: "A" if a == "x" else "TIE"), ["p"], ["x"], ["y"])
    assert (half["outcomes"], half["inconsistent"], half["interval"]) == ([0.5], 1.0, None)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="two answers to each prompt; got 2, 2, 1"):
        win_rate(knowing(longer), ["p", "q"], ["x", "y"], ["z"])
    with pytest.raises(UserError, match=r"template lacks \{b\}"):
        win_rate(Judge("someone", lambda questions, origins: list(questions), "{prompt} {a}"), ["p"], ["x"], ["y"])


@pytest.fixture
def server(monkeypatch):
    """A server that replies by `server.replies`, question -> (status, body); `server.asked` are the bodies it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            its.asked.append((self.path, self.headers["Authorization"], body))
            status, reply = its.replies(body["messages"][-1]["content"])
            if status is None:
                return  # hangs up
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    its = SimpleNamespace(asked=[], replies=None, url=f"http://127.0.0.1:{http.server_port}/v1/")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield its
    http.shutdown()
    thread.join()
    http.server_close()


def says(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def judge_of(server, **settings):
    return judges.endpoint(server.url, "model-1", **{"template": TEMPLATE, "key": "JUDGE_KEY", "wait": 0.01} | settings)


def test_an_endpoint_is_asked_as_openai_has_it_and_again_after_troubles(server):
    troubles = [(429, {"error": "slow down"}), (503, {}), (None, None)]

    def replies(question):
        if troubles and question.startswith("p|long"):
            return troubles.pop(0)
        return says(f"Because.\n[[{longer(*question.split('|'))}]]")

    server.replies = replies
    found = win_rate(judge_of(server), ["p", "q", "r"], ["long", "a", "b"], ["x", "longer", "c"])
    assert found["outcomes"] == [1.0, 0.0, 0.5]
    assert not troubles
    assert len(server.asked) == 6 + 3
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body.keys() == {"model", "messages", "temperature"}
    assert (body["model"], body["temperature"]) == ("model-1", 0)


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (says("I like A."), UserError, r"no verdict, .*'I like A.'; it was asked:\np\|long\|x"),
        (says("[[A]], or rather [[B]]"), UserError, "more than one verdict"),
        ((200, {"choices": []}), UserError, "no chat completion: .*it was asked:\np"),
        ((401, {"error": "wrong key"}), UserError, "refuses model-1: status 401: .*wrong key.*it was asked:\np"),
        ((500, {"error": "busy"}), TransientError, "did not reply in 2 tries: status 500: .*busy.*it was asked:\np"),
    ],
)
def test_a_judgement_that_fails_is_an_error_with_its_question(server, reply, kind, message):
    server.replies = lambda question: reply
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        win_rate(judge_of(server, tries=2, at_once=1), ["p"], ["long"], ["x"], ["rows.jsonl:7"])
    assert caught.type is kind
    assert str(caught.value).startswith("rows.jsonl:7: ")


def test_an_endpoint_that_cannot_be_asked(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="needs a key; set the environment variable JUDGE_KEY"):
        win_rate(judge_of(server), ["p"], ["long"], ["x"])
    with pytest.raises(UserError, match="the URL of an endpoint is like https://HOST/v1"):
        win_rate(judges.endpoint("ftp://x", "m", key=""), ["p"], ["long"], ["x"])
    server.replies = lambda question: says("[[TIE]]")
    assert win_rate(judge_of(server, key=""), ["p"], ["long"], ["x"])["rate"] == 0.5
    assert {key for _, key, _ in server.asked} == {None}


def test_a_model_here_prefers_the_likelier_letter():
    model, tokenizer = Decoder(spec(vocab_size=400, max_position_embeddings=128)), make_tokenizer(CHATML)
    params = {"params": numpy_params(model)}
    mesh = one_device()
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    judge = judges.local(SimpleNamespace(source="m", model=model, tokenizer=tokenizer), placed, TEMPLATE)
    questions = [f"{word}|x|y" for word in ("one", "two", "red", "lamp", "seven", "send it")]
    rows = [prompts.tokens(prompts.Prompt("", {"prompt": text}), tokenizer) for text in questions]
    ends = np.array([len(row) for row in rows])
    positions = np.tile(np.arange(ends.max()), (len(rows), 1))
    tokens = np.stack([np.pad(row, (0, ends.max() - len(row))) for row in rows])
    batch = {"tokens": tokens, "positions": positions, "segment_ids": (positions < ends[:, None]).astype(np.int32)}
    a, b = (tokenizer.encode(letter, add_special_tokens=False) for letter in "AB")
    assert len(a) == len(b) == 1
    last = logits(model, params, batch)[np.arange(len(rows)), ends - 1]
    expected = ["A" if row[a[0]] > row[b[0]] else "B" for row in last]
    assert set(expected) == {"A", "B"}
    assert judge.verdicts(questions, questions) == expected


def test_the_docs_show_the_template():
    page = (Path(__file__).parent.parent.parent / "docs/evaluation.md").read_text()
    assert f"```text\n{judges.REASONED}\n```" in page
    assert judges.LETTER.rpartition("\n")[2] in page


def test_a_conversation_is_shown_with_its_roles():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert judges.text_of(prompts.Prompt("", {"messages": turns})) == "system: Be brief.\n\nuser: Hi"
    assert judges.text_of(prompts.Prompt("", {"messages": turns[1:]})) == "Hi"
    assert judges.text_of(prompts.Prompt("", {"prompt": "Hi"})) == "Hi"
