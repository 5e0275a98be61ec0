"""What the page's server answers, and whom: without a socket."""

import base64
import hashlib
import json
import re
import sys

import pytest
from starlette.testclient import TestClient
from support.labeling import EVIL, make_pairs, session_of

from ftjax.errors import UserError
from ftjax.labeling import server

TOKEN = "secret-token"


class Page:
    """The server as the page of one labeler speaks to it."""

    def __init__(self, root, prompts=3, question="Which answer is better?", labeler="anna"):
        self.pairs = make_pairs(root, prompts)
        session, self.kept = session_of(root, self.pairs)
        self.app = server.app(session, TOKEN, question, labeler, lambda: [f"{len(self.kept.labels)} judged"])
        self.client = TestClient(self.app, base_url="http://127.0.0.1:8123")

    def ask(self, action, labeler="anna", token=TOKEN, **more):
        headers = {"Authorization": f"Bearer {token}"}
        return self.client.post(f"/{action}", json={"labeler": labeler, **more}, headers=headers)

    def judge(self, choice, labeler="anna"):
        pair = self.ask("next", labeler).json()["pair"]["id"]
        return self.ask("judge", labeler, pair=pair, choice=choice).json()


@pytest.fixture
def page(tmp_path):
    return Page(tmp_path)


def test_a_judgement_is_recorded_and_answered_with_the_next_pair(page):
    first = page.ask("next").json()
    assert first["pair"]["id"] == page.pairs[0].id
    assert (first["progress"], first["undo"]) == ({"judged": 0, "open": 3, "per_hour": None, "held": 0}, False)
    second = page.judge("right")
    assert second["pair"]["id"] == page.pairs[1].id
    assert (second["progress"]["judged"], second["undo"]) == (1, True)
    label = page.kept.labels[page.pairs[0].id]["anna"]
    assert label.choice != label.left
    assert page.ask("undo").json()["pair"]["id"] == page.pairs[0].id
    for choice in ("left", "tie", "skip"):
        last = page.judge(choice)
    assert "pair" not in last
    assert last["summary"] == ["3 judged"]


def test_two_windows_two_labelers_and_an_end(page):
    assert page.ask("next", "ben").json()["pair"]["id"] == page.pairs[0].id
    assert page.ask("next", "anna").json()["pair"]["id"] == page.pairs[1].id
    stale = page.ask("judge", "anna", pair=page.pairs[0].id, choice="left")
    assert (stale.status_code, stale.json()["stale"], stale.json()["pair"]["id"]) == (409, True, page.pairs[1].id)
    assert not page.kept.labels
    assert page.ask("finish", "ben").json() == {"summary": ["0 judged"]}
    page.judge("tie", "anna")
    assert page.ask("next", "anna").json()["pair"]["id"] == page.pairs[0].id


def test_nobody_without_the_token_gets_anything(page):
    assert page.client.get("/", params={"token": TOKEN}).status_code == 200
    for given in ("", "secret-toke", TOKEN + "x", "ü"):
        refused = page.client.get("/", params={"token": given})
        assert (refused.status_code, list(refused.json())) == (403, ["error"])
    for action in server.ACTIONS:
        assert page.client.post(f"/{action}", json={"labeler": "anna"}).status_code == 403
        assert page.client.post(f"/{action}?token={TOKEN}", json={"labeler": "anna"}).status_code == 403
        assert page.ask(action, token="wrong").status_code == 403
        assert page.client.get(f"/{action}").status_code == 405
    assert not page.kept.labels


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7:8123", ""])
def test_another_name_of_this_machine_is_refused(page, host):
    """A foreign name made to point here (DNS rebinding) comes with its own Host."""
    found = page.client.get("/", params={"token": TOKEN}, headers={"Host": host})
    assert found.status_code == 400
    assert "pair" not in found.text
    assert page.client.get("/", params={"token": TOKEN}, headers={"Host": "localhost:8123"}).status_code == 200


def test_other_sites_are_told_nothing(page):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answers = [
        page.client.options("/judge", headers=headers),
        page.client.get("/", params={"token": TOKEN}, headers={"Origin": "http://evil.example"}),
        page.ask("next"),
        page.ask("next", token="wrong"),
    ]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for answer in answers[1:]:
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in answer.headers


def test_the_page_has_its_own_script_and_style_and_may_load_nothing(tmp_path):
    page = Page(tmp_path, question="Which is <b>better</b>?", labeler='"><script>alert(1)</script>')
    answer = page.client.get("/", params={"token": TOKEN})
    (style,), (script,) = (re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL) for tag in ("style", "script"))
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'{hashes[0]}'",
        "script-src": f"'{hashes[1]}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "require-trusted-types-for": "'script'",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    assert not re.search(r"https?://|url\(|innerHTML|insertAdjacent|eval\(|onclick|style=|src=", answer.text)
    assert TOKEN not in answer.text
    assert "Which is &lt;b&gt;better&lt;/b&gt;?" in answer.text


def test_what_a_model_wrote_arrives_as_text(tmp_path):
    pair = Page(tmp_path, prompts=1).ask("next").json()["pair"]
    sides = ["".join(text for text, _ in pair[side]) for side in ("left", "right")]
    assert EVIL.replace("\u202e", "[U+202E]").replace("\x1b", "[U+001B]") in sides
    assert pair["prompt"] == [["user", "Where is order 0?"]]


def test_what_differs_is_marked(page):
    page.judge("left")
    pair = page.ask("next").json()["pair"]
    assert {json.dumps(pair[side]) for side in ("left", "right")} == {
        json.dumps([["Order 1 was sent on day", False], [" ", False], [day, True], [".", False]]) for day in "01"
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "not understood"),
        (b"[]", "not understood"),
        (b'{"labeler": ""}', "1 to 64 printable characters"),
        (b'{"labeler": "anna", "pair": "x", "choice": "undo"}', "not understood"),
        (b'{"labeler": "anna", "choice": "left"}', "not understood"),
    ],
)
def test_what_is_not_understood_is_refused(page, content, message):
    answer = page.client.post("/judge", content=content, headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert not page.kept.labels


def test_a_judgement_that_cannot_be_written_is_not_said_to_be_saved(page, monkeypatch):
    pair = page.ask("next").json()["pair"]["id"]
    with monkeypatch.context() as patch:
        patch.setattr(page.kept, "add", full)
        answer = page.ask("judge", pair=pair, choice="left")
    assert (answer.status_code, answer.json()) == (500, {"error": "[Errno 28] No space left on device"})
    assert page.ask("judge", pair=pair, choice="left").json()["progress"]["judged"] == 1


def full(label):
    raise OSError(28, "No space left on device")


def test_a_missing_library_and_a_port_that_is_taken_are_named(monkeypatch):
    with server.listen(0) as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; name another"):
            server.listen(port)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'ftjax\[label\]', or --terminal"):
        server.import_library()
