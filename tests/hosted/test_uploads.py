"""/v1/uploads as the official client, unmodified, uses it."""

import hashlib
import json
import random
import threading

import openai
import pytest
from support.hosted import hosted

ROWS = b"".join(json.dumps({"prompt": f"{n}?", "completion": "Grüße"}).encode() + b"\n" for n in range(1000))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with hosted(tmp_path_factory.mktemp("uploads") / "serve", **{"limits.requests_per_minute": 100_000}) as server:
        yield server


def begin(client, nbytes, **more):
    given = {"bytes": nbytes, "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return client.uploads.create(**given | more)


def parts_folder(server):
    return server.files.folder.parent / "uploads"


def test_the_client_uploads_a_file_in_chunks(server, tmp_path):
    client = server.client()
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    upload = client.uploads.upload_file_chunked(
        file=tmp_path / "rows.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=10_000,
        md5=hashlib.md5(ROWS).hexdigest(),
    )
    assert (upload.object, upload.status, upload.bytes, upload.filename) == (
        "upload",
        "completed",
        len(ROWS),
        "rows.jsonl",
    )
    assert client.files.retrieve(upload.file.id) == upload.file
    assert client.files.content(upload.file.id).read() == ROWS
    assert list(parts_folder(server).iterdir()) == []


def test_parts_come_in_any_order_and_again(server):
    client = server.client()
    upload = begin(client, len(ROWS), expires_after={"anchor": "created_at", "seconds": 7200})
    assert (upload.status, upload.expires_at, upload.file) == ("pending", upload.created_at + 3600, None)
    pieces = {place: ROWS[place : place + 5000] for place in range(0, len(ROWS), 5000)}
    order = random.Random(0).sample(sorted(pieces), len(pieces))
    sent, lock = {}, threading.Lock()

    def send(places):
        for place in places:
            part = client.uploads.parts.create(upload.id, data=pieces[place])
            assert (part.object, part.upload_id) == ("upload.part", upload.id)
            with lock:
                sent[place] = part.id

    threads = [threading.Thread(target=send, args=(order[k::4],)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.uploads.parts.create(upload.id, data=pieces[0])  # lost its answer, and is not named below
    ids = [sent[place] for place in sorted(sent)]
    done = client.uploads.complete(upload.id, part_ids=ids)
    assert client.files.content(done.file.id).read() == ROWS
    assert done.file.expires_at == done.file.created_at + 7200
    assert client.uploads.complete(upload.id, part_ids=ids) == done  # asked again, as after a lost answer
    assert list(parts_folder(server).iterdir()) == []
    with pytest.raises(openai.BadRequestError, match="the upload is completed"):
        client.uploads.parts.create(upload.id, data=b"late")
    with pytest.raises(openai.BadRequestError, match="the upload is completed"):
        client.uploads.cancel(upload.id)


def test_what_does_not_fit_is_refused_and_may_be_mended(server):
    client = server.client()
    upload = begin(client, 8)
    first = client.uploads.parts.create(upload.id, data=b'{"a"')
    for ids, param, why in (
        ([first.id], "part_ids", "the parts have 4 bytes, and the upload was begun for 8"),
        ([first.id, first.id], "part_ids", "twice"),
        ([first.id, "part_x"], "part_ids", "no part 'part_x'"),
        ([], "part_ids", "at least 1 item"),
    ):
        with pytest.raises(openai.BadRequestError, match=why) as refused:
            client.uploads.complete(upload.id, part_ids=ids)
        assert refused.value.param == param
    wrong = client.uploads.parts.create(upload.id, data=b": 1 ")
    with pytest.raises(openai.BadRequestError, match="line 1: not JSON") as refused:
        client.uploads.complete(upload.id, part_ids=[first.id, wrong.id])
    assert refused.value.code == "invalid_file_format"
    right = client.uploads.parts.create(upload.id, data=b": 1}")
    with pytest.raises(openai.BadRequestError, match="md5 of the parts is") as refused:
        client.uploads.complete(upload.id, part_ids=[first.id, right.id], md5="0" * 32)
    assert refused.value.code == "md5_mismatch"
    md5 = hashlib.md5(b'{"a": 1}').hexdigest().upper()
    done = client.uploads.complete(upload.id, part_ids=[first.id, right.id], md5=md5)
    assert client.files.content(done.file.id).read() == b'{"a": 1}'


def test_a_cancelled_upload_is_over(server):
    client = server.client()
    upload = begin(client, 100)
    part = client.uploads.parts.create(upload.id, data=b"x")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    for late in (
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
        lambda: client.uploads.complete(upload.id, part_ids=[part.id]),
        lambda: client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.BadRequestError, match="the upload is cancelled"):
            late()
    assert list(parts_folder(server).iterdir()) == []


def test_an_upload_expires_in_an_hour(server, monkeypatch):
    client = server.client()
    upload = begin(client, 100)
    client.uploads.parts.create(upload.id, data=b"x")
    monkeypatch.setattr("ftjax.hosted.uploads.time.time", lambda: upload.expires_at)
    with pytest.raises(openai.BadRequestError, match="the upload is expired"):
        client.uploads.parts.create(upload.id, data=b"x")
    assert len(list(parts_folder(server).iterdir())) == 1
    server.uploads.expire()
    assert list(parts_folder(server).iterdir()) == []
    with pytest.raises(openai.BadRequestError, match="the upload is expired"):
        client.uploads.cancel(upload.id)
    monkeypatch.setattr("ftjax.hosted.uploads.time.time", lambda: upload.expires_at + 24 * 3600)
    server.uploads.expire()
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel(upload.id)


def test_anothers_upload_is_not_there(server):
    upload = begin(server.client("owner"), 100)
    part = server.client("owner").uploads.parts.create(upload.id, data=b"x")
    other = server.client("other")
    for ask in (
        lambda: other.uploads.parts.create(upload.id, data=b"x"),
        lambda: other.uploads.complete(upload.id, part_ids=[part.id]),
        lambda: other.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    mine = begin(other, 1)
    with pytest.raises(openai.BadRequestError, match="no part"):
        other.uploads.complete(mine.id, part_ids=[part.id])


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": 9 * 2**30}, 413, "bytes"),
        ({"purpose": "batch"}, 400, "purpose"),
        ({"filename": ""}, 400, "filename"),
        ({"filename": "a\x00b"}, 400, None),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, 400, "expires_after[anchor]"),
        ({"expires_after": {"anchor": "created_at"}}, 400, "expires_after.seconds"),
        ({"extra_body": {"parts": 3}}, 400, "parts"),
    ],
)
def test_uploads_that_cannot_be_are_refused_at_once(server, given, status, param):
    with pytest.raises(openai.APIStatusError) as refused:
        begin(server.client(), **{"nbytes": given.pop("bytes", 10)} | given)
    assert (refused.value.status_code, refused.value.param) == (status, param)


def test_parts_count_against_what_a_key_may_have(tmp_path):
    with hosted(tmp_path / "serve", **{"files.quota_mb": 2}) as server:
        client = server.client()
        with pytest.raises(openai.PermissionDeniedError):
            begin(client, 3 * 2**20, purpose="user_data")
        upload = begin(client, 2**20, purpose="user_data")
        part = client.uploads.parts.create(upload.id, data=b"x" * 2**20)
        client.uploads.parts.create(upload.id, data=b"x" * (2**20 - 1000))
        with pytest.raises(openai.PermissionDeniedError):
            client.uploads.parts.create(upload.id, data=b"x" * 2000)
        assert len(list(parts_folder(server).iterdir())) == 2
        key = server.key("anna")
    with hosted(tmp_path / "serve", **{"files.quota_mb": 2}) as server:  # which counts what is there
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        (parts_folder(server) / ".part.tmp-1").write_bytes(b"half")
        with pytest.raises(openai.PermissionDeniedError):
            client.files.create(file=b"x" * 2000, purpose="user_data")
        client.uploads.complete(upload.id, part_ids=[part.id])
        client.files.create(file=b"x" * (2**20 - 1000), purpose="user_data")
        with pytest.raises(openai.PermissionDeniedError):
            client.files.create(file=b"x" * 2000, purpose="user_data")
    with hosted(tmp_path / "serve") as server:
        assert list(parts_folder(server).iterdir()) == []


def test_parts_are_not_more_than_the_upload(server, monkeypatch):
    monkeypatch.setattr("ftjax.hosted.uploads.PART", 10)
    client = server.client()
    upload = begin(client, 5)
    with pytest.raises(openai.APIStatusError) as refused:
        client.uploads.parts.create(upload.id, data=b"x" * 11)
    assert refused.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="the part is empty"):
        client.uploads.parts.create(upload.id, data=b"")
    client.uploads.parts.create(upload.id, data=b"x" * 10)
    client.uploads.parts.create(upload.id, data=b"x" * 5)
    with pytest.raises(openai.BadRequestError, match="more than the 5 bytes"):
        client.uploads.parts.create(upload.id, data=b"x")
    client.uploads.cancel(upload.id)
