"""A thousand requests that nobody should send: each gets a 4xx with a message, none a 5xx."""

import http.client
import json
import random
import string
from urllib.parse import quote

import pytest
from support.hosted import hosted, routes_of

COUNT = 1000
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW")
NASTY = (
    "",
    "x",
    "..",
    "../..",
    "%2e%2e%2f",
    "a/b",
    "%00",
    "\u202e",
    "é" * 300,
    "'; DROP TABLE files;--",
    "${7*7}",
    "{}",
)
JSON = (None, True, -1, 0, 2**70, 1.5, 1e300, "", "fine-tune", "\ud800", "a\0b", [], [[]], {}, {"a": {}}, ["x"] * 50)


# What would be right, for what is then made wrong in it.
RIGHT = {
    "/v1/uploads": {"bytes": 10, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"},
    "/v1/uploads/{upload_id}/complete": {"part_ids": ["part_" + "0" * 24], "md5": "0" * 32},
}


class Fuzzer:
    """Draws requests. What could be right by chance is made wrong: an unknown field, an id of nobody's.

    ids: {parameter of a path: an id that is there}, for posts.
    """

    def __init__(self, seed, routes, ids):
        self.draw, self.routes, self.ids = random.Random(seed), routes, ids

    def request(self):
        draw = self.draw
        template, methods = draw.choice(self.routes)
        method = draw.choice(methods if draw.random() < 0.8 else METHODS)
        kind = draw.choice((self.json, self.json, self.form, self.form, self.bytes, self.nothing))
        there = method == "POST" and kind != self.nothing and not template.endswith("/cancel")
        path, rest = template, ""
        while "{" in path:
            start, rest = path.split("{", 1)
            name, rest = rest.split("}", 1)
            path = start + (self.ids[name] if there and name in self.ids and draw.random() < 0.8 else self.id()) + rest
        if draw.random() < 0.1:
            path = f"{path}/{draw.choice(NASTY)}"
        headers, content = kind(RIGHT.get(template, {}))
        if draw.random() < 0.3:
            path += "?" + "&".join(f"{self.name()}={self.text()}" for _ in range(draw.randint(1, 4)))
        if draw.random() < 0.1:
            headers |= {draw.choice(("Content-Type", "Accept", "Range", "Expect", "X-Request-Id")): self.token()}
        return method, path, headers, content

    def id(self):
        kind = self.draw.choice(("file-", "upload_", "ftjob-", "ft:", ""))
        return kind + self.draw.choice([*NASTY[1:], "0" * 24, "f" * 24, "9" * 4000]).replace("/", "%2F")

    def name(self):
        names = ("after", "limit", "order", "purpose", "metadata[a]", "file", "bytes", "purpose", "data", "part_ids")
        return self.draw.choice(names)

    def text(self):
        return self.draw.choice((*NASTY, "-1", "0", "10001", "9" * 5000, "NaN", "asc", "%FF", "file-" + "0" * 24))

    def token(self):
        return "".join(self.draw.choices(string.printable[:94], k=self.draw.randint(1, 40))).strip() or "x"

    def json(self, right):
        names = [self.draw.choice([*right, self.name()]) for _ in range(self.draw.randint(0, 3))]
        body = right | {name: self.draw.choice(JSON) for name in names} | {"nobody_knows": 1}
        text = json.dumps(self.draw.choice((body, body, [body], "text", 1, None))).encode()
        if self.draw.random() < 0.2:
            text = text[: self.draw.randrange(len(text))]
        if self.draw.random() < 0.05:
            text = b"[" * 100_000
        return {"Content-Type": "application/json"}, text

    def form(self, right):
        parts = []
        for _ in range(self.draw.randint(0, 4)):
            disposition = f'Content-Disposition: form-data; name="{self.name()}"'
            if self.draw.random() < 0.5:
                disposition += f'; filename="{self.draw.choice(NASTY)}"'
            parts.append(f"--b\r\n{disposition}\r\n\r\n{self.draw.choice(('fine-tune', '{}', '', 'x' * 70_000))}\r\n")
        parts.append('--b\r\nContent-Disposition: form-data; name="nobody_knows"\r\n\r\n1\r\n--b--\r\n')
        content = "".join(parts).encode()
        if self.draw.random() < 0.3:
            content = content[: self.draw.randrange(len(content))]
        boundary = self.draw.choice((*["; boundary=b"] * 8, "; boundary=c", "", "; boundary=" + "b" * 300))
        return {"Content-Type": f"multipart/form-data{boundary}"}, content

    def bytes(self, right):
        kind = self.draw.choice(("application/json", "multipart/form-data; boundary=b", "text/plain", "a", ";"))
        return {"Content-Type": kind}, self.draw.randbytes(self.draw.randrange(3000))

    def nothing(self, right):
        return {}, b""


def ask(url, method, path, headers, content):
    """(status, headers, body), with the path as it stands: the usual clients would put it in order."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        path = quote(path, safe=string.punctuation)
        headers = {"Content-Length": str(len(content))} | headers
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("known", [True, False], ids=["with a key", "without"])
def test_malformed_requests_are_refused_with_a_message(tmp_path, known):
    with hosted(tmp_path / "serve", **{"limits.requests_per_minute": 100_000}) as server:
        asked = routes_of(server.application, "/v1/")
        assert {"/v1/files/{file_id}/content", "/v1/uploads/{upload_id}/complete"} <= {path for path, _ in asked}
        upload = server.client().uploads.create(**RIGHT["/v1/uploads"])
        fuzzer, statuses = Fuzzer(17, [*asked, ("/v1/nowhere", ["GET"])], {"upload_id": upload.id}), []
        key = server.key("anna") if known else "sk-wrong"
        while len(statuses) < COUNT:
            method, path, headers, content = fuzzer.request()
            status, answered, body = ask(
                server.url, method, path, {"Authorization": f"Bearer {key}", **headers}, content
            )
            if status == 200 and method == "GET":
                continue  # lists, whatever else the request has
            statuses.append(status)
            assert 400 <= status < 500, (method, path, headers, content[:200], body)
            assert json.loads(body)["error"]["message"]
            assert answered["x-request-id"].startswith("req_")
        assert ask(server.url, "GET", "/healthz", {}, b"")[0] == 200
        assert all(statuses.count(status) > COUNT / 20 for status in ((400, 404, 405) if known else (401,)))
        assert server.client().files.list().data == []
        assert list(server.files.folder.iterdir()) == []
