"""The server over a real PostgreSQL does what it does over SQLite."""

import openai
import pytest
from support.hosted import hosted
from support.postgres import postgres

from ftjax.errors import UserError
from ftjax.hosted.database import connect

ROW = b'{"messages": []}\n'


@pytest.fixture(scope="module")
def url():
    with postgres() as url:
        yield url


def test_files_uploads_and_keys_are_kept(url, tmp_path):
    changes = {"database": url, "limits.requests_per_minute": 100_000}
    with hosted(tmp_path / "serve", **changes) as server:
        key, client = server.key("anna"), server.client()
        files = [client.files.create(file=(f"{n}.jsonl", ROW), purpose="fine-tune") for n in range(3)]
        upload = client.uploads.create(bytes=2**32, filename="x", mime_type="text/plain", purpose="user_data")
        part = client.uploads.parts.create(upload.id, data=b"x")
        with pytest.raises(openai.BadRequestError, match="begun for 4,294,967,296"):
            client.uploads.complete(upload.id, part_ids=[part.id])
        done = client.uploads.upload_file_chunked(
            file=ROW * 2, filename="y", bytes=2 * len(ROW), mime_type="x", purpose="fine-tune", part_size=10
        )
        with pytest.raises(openai.NotFoundError):
            server.client("ben").files.retrieve(files[0].id)
        with pytest.raises(openai.BadRequestError, match="NUL"):
            client.files.list(after="file-\0")
        client.files.delete(files[1].id)
    with hosted(tmp_path / "serve", **changes) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert [file.id for file in client.files.list(limit=2)] == [done.file.id, files[2].id, files[0].id]
        assert client.files.content(done.file.id).read() == ROW * 2
        assert client.uploads.cancel(upload.id).status == "cancelled"
        server.keys.revoke(server.keys.all()[0].id)
        with pytest.raises(openai.AuthenticationError):
            client.files.list()


def test_an_address_where_there_is_none_is_said(url):
    with pytest.raises(UserError, match="does not open"):
        connect(url.replace("host=", "host=/nowhere"))
