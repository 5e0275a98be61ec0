"""What the page asks for beside OpenAI's routes: the check of a file's rows, the adapter of a model; and the page."""

import io
import json
import re
import zipfile
from types import SimpleNamespace

import httpx2
import pytest
from sqlalchemy.orm import Session
from support.plain_hosted import PlainFiles, application, served
from support.runs import write_model

from ftjax.hosted.database import connect
from ftjax.hosted.jobs.tables import Checkpoint
from ftjax.hosted.models import Trained
from ftjax.hosted.page import adapters, checking, page
from ftjax.reporting.harmless import digest

NAME = "ft:tiny:alice:lamps:abcd"


def row(number, role="assistant"):
    question = {"role": "user", "content": f"The lamp of room {number} is broken"}
    return {"messages": [question, {"role": role, "content": f"send {number}"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With the model NAME of alice, in whose folder there is a link that leads out of it."""
    folder = tmp_path_factory.mktemp("page")
    settings = {"model.source": str(write_model(folder / "model")), "model.dtype": "float32", "data.max_length": 96}
    files, engine = PlainFiles(folder / "files"), connect(f"sqlite:///{folder}/server.db")
    adapter = folder / "adapter"
    (adapter / "more").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    (adapter / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 9000)  # of several blocks
    (adapter / "more/tokenizer.json").write_text("{}")
    (folder / "secret").write_text("no one's")
    (adapter / "link").symlink_to(folder / "secret")
    (adapter / "folder").symlink_to(folder)
    with Session(engine) as session, session.begin():
        values = {"owner": "alice", "created_at": 1, "step": 4, "adapter": str(adapter), "metrics": {}}
        session.add(Checkpoint(id="ftckpt_1", job="ftjob-1", name=NAME, **values))
    app = application(page.routes(), checking.routes(files, settings), adapters.routes(Trained(engine, "tiny")))
    app.include_router(checking.routes(files, settings, seconds=0.2), prefix="/hurried")
    with served(app) as url:
        yield SimpleNamespace(url=url.removesuffix("/v1"), files=files, adapter=adapter)
    engine.dispose()


def get(server, path, owner="alice"):
    return httpx2.get(server.url + path, headers={"Authorization": f"Bearer {owner}"}, timeout=600)


def check(server, id, owner="alice", prefix="", **body):
    headers = {"Authorization": f"Bearer {owner}"}
    return httpx2.post(f"{server.url}{prefix}/v1/ftjax/files/{id}/check", json=body, headers=headers, timeout=600)


def test_the_page_forbids_all_that_is_not_itself(server):
    answer = get(server, "/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["connect-src"] == "'self'"
    (script,), (style,) = (re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL) for tag in ("script", "style"))
    assert (policy["script-src"], policy["style-src"]) == (f"'{digest(script)}'", f"'{digest(style)}'")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', answer.text.replace(script, "")) == ["data:,"]


def test_the_check_of_bad_rows_names_the_lines(server):
    rows = [
        row(0),
        {"messages": [{"role": "user", "content": "?"}]},
        row(2),
        row(3, "asistant"),
        *map(row, range(4, 9)),
    ]
    found = check(server, server.files.add(rows, filename="lamps.jsonl")).json()
    assert not found["passed"]
    assert [(one["severity"], one["places"]) for one in found["findings"]] == [
        ("error", ["lamps.jsonl:2"]),
        ("error", ["lamps.jsonl:4"]),
    ]
    assert found["findings"][1]["message"].startswith("lamps.jsonl:4: message 1 has the role 'asistant'; use one of ")
    assert (found["figures"]["rows"], found["figures"]["used"]) == (9, 7)
    assert str(server.files.folder) not in json.dumps(found)


def test_rows_of_another_method_are_not_this_ones(server):
    file = server.files.add([row(number) for number in range(9)], filename="lamps.jsonl")
    found = check(server, file, method="dpo").json()
    assert not found["passed"]
    assert "is a row of chat; a preference needs" in found["findings"][0]["message"]
    assert found["findings"][0]["places"] == ["lamps.jsonl:1", "lamps.jsonl:2", "lamps.jsonl:3"]


def test_good_rows_pass_with_what_auto_stands_for_and_leaks_are_told(server):
    train, heldout = (server.files.add([row(number) for number in range(*ends)]) for ends in ((0, 60), (50, 70)))
    found = check(server, train, validation_file=heldout).json()
    assert "leak" in {one["code"] for one in found["findings"]}
    assert found["auto"].keys() == {"n_epochs", "batch_size", "learning_rate"}
    assert found["figures"]["heldout"] == 20


def test_what_is_anothers_is_not_there_to_be_checked(server):
    mine, theirs = server.files.add([row(1)]), server.files.add([row(1)], owner="bert")
    assert check(server, mine, owner="bert").status_code == 404
    assert check(server, mine, validation_file=theirs).status_code == 404
    assert check(server, "file-none").status_code == 404
    assert check(server, mine, method="reinforcement").json()["error"]["param"] == "method"
    other = server.files.write("alice", "fine-tune-results", "metrics.csv", [b"step"]).id
    assert "purpose" in check(server, other).json()["error"]["message"]


def test_a_check_that_takes_too_long_ends(server):
    answer = check(server, server.files.add([row(1)]), prefix="/hurried")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "check_too_long")


def test_the_adapter_comes_as_a_zip_of_its_folder_and_of_nothing_else(server):
    answer = get(server, f"/v1/ftjax/models/{NAME}/adapter")
    assert answer.headers["content-disposition"] == 'attachment; filename="ft-tiny-alice-lamps-abcd.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found.keys() == {"adapter_config.json", "adapter_model.safetensors", "more/tokenizer.json"}
    for name, data in found.items():
        assert data == (server.adapter / name).read_bytes()


def test_there_is_no_adapter_of_the_base_or_of_what_is_anothers(server):
    assert get(server, f"/v1/ftjax/models/{NAME}/adapter", "bert").status_code == 404
    assert get(server, "/v1/ftjax/models/tiny/adapter").status_code == 400
    for name in ("../secret", "%2e%2e%2fsecret", "none", NAME + "%2f..%2f.."):
        assert get(server, f"/v1/ftjax/models/{name}/adapter").status_code == 404
