"""python -m ftjax.serve as a process: its first start, keys on the command line, its end, and going on."""

import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from support import PYTHONPATH, ROOT

import ftjax.hosted
from ftjax import serve
from ftjax.errors import UserError
from ftjax.hosted.database import connect

ENV = os.environ | {"PYTHONPATH": PYTHONPATH}
COMMAND = [sys.executable, "-m", "ftjax.serve", "--config", "configs/serve.py", "--config.port=0"]


@contextlib.contextmanager
def serving(folder, *more):
    """(process, its address, the lines before that)."""
    command = [*COMMAND, f"--config.folder={folder}", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, env=ENV, **pipes) as process:
        try:
            first = process.stdout.readline()
            found = re.search(r"(https?)://(\S+:\d+)/v1", first)
            assert found, first + process.stderr.read()
            yield process, found[0]
        finally:
            if process.poll() is None:
                process.kill()


def command(folder, *words, code=0):
    done = subprocess.run(
        [*COMMAND, f"--config.folder={folder}", *words], capture_output=True, text=True, cwd=ROOT, env=ENV
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def until_answers(client):
    for _ in range(100):
        with contextlib.suppress(openai.APIConnectionError):
            return client.files.list()
        time.sleep(0.1)
    raise AssertionError


def test_a_server_from_its_first_start_to_its_second(tmp_path):
    folder = tmp_path / "served"
    with serving(folder) as (process, url):
        line = process.stdout.readline()
        key = re.search(r"an API key, which is not shown again: (tml-\S+)", line)[1]
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        until_answers(client)
        file = client.files.create(file=("a.jsonl", b'{"a": 1}\n'), purpose="fine-tune")
        assert os.stat(folder).st_mode & 0o077 == 0

        assert "another server uses it" in command(folder, code=2)

        printed = command(folder, "keys", "create", "ben")  # while the server runs
        id, secret = re.search(r"(key_\S+) is the key of ben.*\n(tml-\S+)", printed).groups()
        ben = openai.OpenAI(base_url=url, api_key=secret, max_retries=0)
        assert ben.files.list().data == []
        listed = command(folder, "keys", "list")
        assert re.search(rf"{id}  {re.escape(secret[:8])}\.\.\.  \d+-\d+-\d+  holds    ben", listed)
        assert secret not in listed
        command(folder, "keys", "revoke", id)
        with pytest.raises(openai.AuthenticationError):
            ben.files.list()

        # What was asked before the signal is answered: a body that is still arriving.
        def pieces():
            yield b'{"a": 1}\n'
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            yield b'{"a": 2}\n'

        late = client.files.with_raw_response.create(file=("late.jsonl", _Slow(pieces())), purpose="fine-tune")
        assert late.parse().bytes == 18
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    with serving(folder) as (process, url):
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        assert {one.id for one in until_answers(client)} == {file.id, late.parse().id}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "API key" not in process.stdout.read()


class _Slow:
    """A file whose size is not known before, and which takes its time."""

    def __init__(self, pieces):
        self._pieces = pieces

    def read(self, size=-1):
        return next(self._pieces, b"")


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_answered(tmp_path):
    """Five times, in the middle of uploads."""
    folder, key, kept = tmp_path / "served", None, set()
    for _ in range(5):
        with serving(folder) as (process, url):
            key = key or re.search(r"(tml-\S+)", process.stdout.readline())[1]
            client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
            assert {file.id for file in until_answers(client)} >= kept
            for id in kept:
                assert client.files.content(id).read() == b'{"a": 1}\n' * 1000
            threading.Timer(0.5, process.kill).start()
            with contextlib.suppress(openai.APIConnectionError):
                while True:
                    made = client.files.create(file=("a.jsonl", b'{"a": 1}\n' * 1000), purpose="fine-tune")
                    kept.add(made.id)
            process.wait(30)
    assert len(kept) >= 5
    on_disk = {path.stem for path in (folder / "files").iterdir()}
    assert kept <= on_disk


def test_mistakes_of_the_command_line(tmp_path):
    folder = tmp_path / "served"
    for words, message in (
        (["key", "list"], "unexpected argument 'key'"),
        (["keys", "revoke", "key_x"], "there is no key key_x"),
        (["--port=1"], "did you mean --config.port=1?"),
        (["--config.host=no.such.host.invalid"], "config.host='no.such.host.invalid'"),
    ):
        assert message in command(folder, *words, code=2)
    with pytest.raises(UserError, match=r"or postgresql\+psycopg"):
        connect("mysql+nothing://x")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.delattr(ftjax.hosted, "server", raising=False)
    monkeypatch.setitem(sys.modules, "ftjax.hosted.server", None)
    with pytest.raises(UserError, match=r"pip install 'ftjax\[serve\]'"):
        serve._server()


def test_tls_is_one_certificate_away(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(make, check=True, capture_output=True)
    with serving(tmp_path / "served", f"--config.certificate={cert}", f"--config.private_key={key}") as (_, url):
        assert url.startswith("https://")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=cert))
        with trusting:
            assert trusting.get(url.replace("/v1", "/healthz")).json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
            httpx.get(url.replace("/v1", "/healthz"))
