"""The page on the server: its script runs, and its keys, limits and metrics are those of the code."""

import io
import json
import logging
import re

import httpx
import yaml
from support import ROOT
from support.hosted import hosted
from support.runs import write_model

from ftjax import config_files
from ftjax.hosted import logs, settings

PAGE = (ROOT / "docs/hosted.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_script_of_the_page_and_what_the_server_tells(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n' * 60)
    monkeypatch.chdir(tmp_path)
    (script,) = [text for kind, text in BLOCKS if kind == "python"]
    stream = io.StringIO()
    model = {"model.source": str(write_model(tmp_path / "tiny")), "model.dtype": "float32"}
    with hosted(tmp_path / "serve", **model) as server:
        logs.begin(stream)
        try:
            script = script.replace("http://127.0.0.1:8000", server.url).replace("KEY", repr(server.key("anna")))
            exec(script, {})
            answered = httpx.post(
                f"{server.url}/v1/files",
                headers={"X-API-Key": server.key("anna")},
                files={"file": ("a", b'{"a": 1}\n{}\n{"abcd":')},
                data={"purpose": "fine-tune"},
            )
            metrics = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": server.key("anna")}).text
        finally:
            for name in logs.LEVELS:
                logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    refused, request = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    assert answered.json() == refused
    assert json.loads(stream.getvalue().splitlines()[0]).keys() == request.keys()
    for name in re.findall(r"^\| `(ftjax_\w+)` \|", PAGE, re.MULTILINE):
        assert f"# HELP {name.removesuffix('_total')}" in metrics


def test_the_keys_of_the_page_are_those_of_the_server(tmp_path):
    table = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (\d+) \|$", PAGE, re.MULTILINE))
    defaults = {key: its.default for key, its in settings.KEYS.items()}
    assert {key: float(value) for key, value in table.items()} == {key: float(defaults[key]) for key in table}
    assert {key for key in defaults if key.startswith(("limits.", "files."))} <= table.keys()
    several = re.findall(r"^\| `([\w.]+)`, `([\w.]+)` \|.*\| (\d+), (\d+) \|$", PAGE, re.MULTILINE)
    assert [(defaults[a], defaults[b]) for a, b, *_ in several] == [(int(a), int(b)) for *_, a, b in several]
    assert set(re.findall(r"--config\.([\w.]+)[=`)]", PAGE)) <= settings.KEYS.keys()
    example = next(text for kind, text in BLOCKS if kind == "yaml")
    (tmp_path / "s.yaml").write_text(example)
    settings.validate(config_files.load(str(tmp_path / "s.yaml"), settings.KEYS))
    assert all(yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml")
