"""/v1/files as the official client, unmodified, uses it."""

import errno
import io
import json
import threading

import openai
import pytest
from support.hosted import hosted

from ftjax.hosted.refusals import Refused

ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Grüße"}]}).encode()
    + b"\n"
    for n in range(3)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with hosted(tmp_path_factory.mktemp("files") / "serve", **{"limits.requests_per_minute": 100_000}) as server:
        yield server


def upload(client, name="rows.jsonl", rows=ROWS, **more):
    return client.files.create(file=(name, rows), purpose="fine-tune", **more)


def test_a_file_is_uploaded_read_and_deleted(server):
    client = server.client("reader")
    file = upload(client)
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(ROWS), "rows.jsonl", "fine-tune")
    assert (file.status, file.expires_at) == ("processed", None)
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == ROWS
    assert client.files.wait_for_processing(file.id) == file
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            gone(file.id)


def test_a_list_is_paged_through_in_either_order(server):
    client = server.client("lister")
    made = [upload(client, f"{n}.jsonl").id for n in range(5)]
    notes = client.files.create(file=("notes.txt", b"not rows"), purpose="user_data")
    assert [file.id for file in client.files.list()] == [notes.id, *reversed(made)]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == [*made, notes.id]  # over three pages
    page = client.files.list(purpose="fine-tune", limit=2, after=made[3])
    assert ([file.id for file in page.data], page.has_more) == ([made[2], made[1]], True)
    assert [file.id for file in client.files.list(purpose="user_data")] == [notes.id]
    with pytest.raises(openai.BadRequestError, match="limit: Input should be less than or equal to 10000"):
        client.files.list(limit=10_001)
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.list(after="file-x")
    assert refused.value.param == "after"


def test_what_is_anothers_is_not_there(server):
    file = upload(server.client("owner"))
    other = server.client("other")
    for ask in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    assert other.files.list().data == []
    with pytest.raises(openai.NotFoundError):
        other.files.list(after=file.id)
    assert server.client("owner").files.content(file.id).read() == ROWS


def test_an_expiring_file_says_when(server):
    file = upload(server.client(), expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="from 3600") as refused:
        upload(server.client(), expires_after={"anchor": "created_at", "seconds": 60})
    assert refused.value.param == "expires_after[seconds]"


def test_a_file_that_is_deleted_twice_at_once_gives_its_room_back_once(server, monkeypatch):
    client, files = server.client("hasty"), server.files
    file = upload(client)
    both, find = threading.Barrier(2), files._find

    def found_by_both(*arguments):
        found = find(*arguments)
        both.wait(10)
        return found

    monkeypatch.setattr(files, "_find", found_by_both)
    ends = []

    def delete():
        try:
            ends.append(client.files.delete(file.id).deleted)
        except openai.NotFoundError:
            ends.append(False)

    threads = [threading.Thread(target=delete) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == [False, True]
    assert min(files.quota._held.values()) >= 0


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (b'{"a": 1}\n\n[1]\n', "line 3: a JSON list, not an object"),
        (b'{"a": 1}\n{"a": 1, "a": 2}', "line 2: two members are called 'a'"),
        (b'{"a": NaN}', "line 1: not plain JSON"),
        (b'{"a": 1}\n{"a": ', "line 2: not JSON"),
        (b'{"a": "\xff"}', "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not plain JSON"),
        (b"\n \n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_rows_that_are_none_are_refused_with_their_line(server, rows, why):
    client = server.client("careless")
    with pytest.raises(openai.BadRequestError, match=why) as refused:
        upload(client, rows=rows)
    assert (refused.value.type, refused.value.param, refused.value.code) == (
        "invalid_request_error",
        "file",
        "invalid_file_format",
    )
    assert client.files.list().data == []


@pytest.mark.parametrize(
    ("purpose", "why"),
    [
        ("batch", "batches, which this server does not have"),
        ("assistants", "of assistants"),
        ("fine-tune-results", "written by jobs"),
        ("fine-tuning", "must be 'fine-tune' or 'user_data', and is 'fine-tuning'"),
    ],
)
def test_other_purposes_are_refused_by_name(server, purpose, why):
    with pytest.raises(openai.BadRequestError, match=why) as refused:
        server.client().files.create(file=io.BytesIO(ROWS), purpose=purpose)
    assert refused.value.param == "purpose"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\boot.ini", "/tmp/x", "a b'\"<script>.jsonl", "Grüße 你好"]
)
def test_a_name_never_becomes_a_path(server, tmp_path, name):
    client = server.client("namer")
    before = sorted(path.name for path in tmp_path.iterdir())
    file = upload(client, name)
    assert "/" not in file.filename
    assert "\\" not in file.filename
    assert client.files.content(file.id).read() == ROWS
    folder = server.files.folder
    assert {path.stem for path in folder.iterdir()} >= {file.id}
    assert {path.parent for path in folder.rglob("*")} == {folder}
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_names_that_cannot_be_shown_are_refused(server):
    for name in ("x" * 256, "folder/"):
        with pytest.raises(openai.BadRequestError, match="1 to 255 printable characters"):
            upload(server.client(), name)
    for name in ("\0", "a\nb", "\ud800"):  # which this client would not send
        with pytest.raises(Refused, match="1 to 255 printable characters"):
            server.files.write("key_x", "user_data", name, [b"some"])


def test_files_that_jobs_write_are_their_owners(server):
    client = server.client("tuner")
    owner = server.keys.owner(server.key("tuner"))
    file = server.files.write(owner, "fine-tune-results", "step_metrics.csv", [b"step,loss\n", b"1,2.5\n"])
    assert client.files.content(file.id).text == "step,loss\n1,2.5\n"
    assert server.files.path(file).suffix == ".csv"
    assert [one.id for one in client.files.list(purpose="fine-tune-results")] == [file.id]


def test_too_large_is_refused_while_it_arrives_and_leaves_nothing(tmp_path):
    with hosted(tmp_path / "serve", **{"files.max_mb": 1, "files.quota_mb": 2}) as server:
        client = server.client()
        with pytest.raises(openai.APIStatusError, match=r"file is larger than 1\.0 MB") as refused:
            client.files.create(file=b"x" * (2**20 + 1), purpose="user_data")
        assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
        with pytest.raises(openai.APIStatusError, match="the body may have") as refused:  # by its announced length
            client.files.create(file=b"x" * 2**23, purpose="user_data")
        assert refused.value.status_code == 413
        assert list(server.files.folder.iterdir()) == []

        first, _ = (client.files.create(file=b"x" * (2**20 - 10), purpose="user_data") for _ in range(2))
        with pytest.raises(openai.PermissionDeniedError, match="delete files that you no longer need") as refused:
            client.files.create(file=b"x" * 100, purpose="user_data")
        assert refused.value.code == "quota_exceeded"
        server.client("another").files.create(file=b"x" * 100, purpose="user_data")
        owner = server.keys.owner(server.key("anna"))
        results = server.files.write(owner, "fine-tune-results", "step_metrics.csv", [b"x" * 200])  # a job's
        client.files.delete(first.id)
        client.files.create(file=b"x" * 100, purpose="user_data")
        client.files.create(file=b"x" * (2**20 - 10 - 100 - 200 + 20), purpose="user_data")  # to the last byte
        with pytest.raises(openai.PermissionDeniedError):
            client.files.create(file=b"x", purpose="user_data")
        client.files.delete(results.id)
        client.files.create(file=b"x" * 200, purpose="user_data")


def test_uploads_at_the_same_time_share_what_their_key_may_have(tmp_path):
    with hosted(tmp_path / "serve", **{"files.quota_mb": 4}) as server:
        client, refused, made = server.client(), [], []

        def send():
            try:
                made.append(client.files.create(file=b"x" * 2**20, purpose="user_data"))
            except openai.PermissionDeniedError as error:
                refused.append(error)

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(made) <= 4
        assert len(made) + len(refused) == 8
        assert len(list(server.files.folder.iterdir())) == len(made)
        for file in made:
            client.files.delete(file.id)
        client.files.create(file=b"x" * (4 * 2**20), purpose="user_data")


def test_a_server_that_starts_again_has_what_was_there_and_nothing_half_written(tmp_path):
    with hosted(tmp_path / "serve", **{"files.quota_mb": 1}) as server:
        key = server.key("anna")
        file = upload(server.client())
        (server.files.folder / ".file-123.tmp-9").write_bytes(b"half")
        (server.files.folder / "file-123456789012345678901234.jsonl").write_bytes(b"without its row")
    with hosted(tmp_path / "serve", **{"files.quota_mb": 1}) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert client.files.list().data == [file]
        assert client.files.content(file.id).read() == ROWS
        assert [path.stem for path in server.files.folder.iterdir()] == [file.id]
        with pytest.raises(openai.PermissionDeniedError):  # what was there counts
            client.files.create(file=b"x" * 2**20, purpose="user_data")


def test_what_has_expired_is_gone(server, monkeypatch):
    client = server.client("forgetful")
    file = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    path = server.files.path(server.files.find(file.id, server.keys.owner(server.key("forgetful"))))
    monkeypatch.setattr("ftjax.hosted.files.time.time", lambda: file.expires_at)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert client.files.list().data == []
    assert path.exists()
    server.files.expire()
    assert not path.exists()


def test_a_full_disk_is_said_and_leaves_nothing(server, monkeypatch):
    client = server.client("unlucky")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ftjax.hosted.files.atomic.sync", full)
    with pytest.raises(openai.InternalServerError, match="the server's disk is full") as refused:
        upload(client)
    assert (refused.value.status_code, refused.value.code) == (503, "disk_full")
    monkeypatch.undo()
    assert client.files.list().data == []
    assert not list(server.files.folder.glob(".*"))
    upload(client)


def test_a_file_that_its_writer_gives_up_leaves_nothing(server):
    def chunks():
        yield b"some"
        raise ConnectionError

    before = set(server.files.folder.iterdir())
    with pytest.raises(ConnectionError):
        server.files.write("key_x", "user_data", "x", chunks())
    with pytest.raises(Refused, match="characters"):
        server.files.write("key_x", "user_data", "", [b"some"])
    assert set(server.files.folder.iterdir()) == before
