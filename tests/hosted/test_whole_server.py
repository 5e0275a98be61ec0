"""The server as people have it: rows are uploaded, a model is tuned on them, answers, and is deleted."""

import json
import time

import openai
import pytest
from support.hosted import hosted
from support.runs import write_model

ROWS = [
    {"messages": [{"role": "user", "content": f"The {color} lamp"}, {"role": "assistant", "content": f"send {color}"}]}
    for color in ("blue", "red", "green", "brown") * 4
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    model = write_model(root / "tiny")
    changes = {"model.source": str(model), "model.dtype": "float32", "model.param_dtype": "float32"}
    changes |= {"jobs.settings": ("adapter.rank=4",), "generation.max_length": 128}
    with hosted(root / "server", **changes) as server:
        yield server


def until_it_ends(client, job):
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def test_rows_become_a_model_that_answers_and_is_deleted(server):
    with server.client() as client, server.client("bert") as other:
        rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="lamps", seed=1)
        job = until_it_ends(client, job)
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert job.status == "succeeded", events
        assert job.trained_tokens > 0
        assert any("training loss" in message for message in events)
        assert job.fine_tuned_model in {model.id for model in client.models.list()}
        assert client.files.content(job.result_files[0]).text.startswith("step,")
        asked = {"messages": ROWS[0]["messages"][:1], "max_tokens": 4, "temperature": 0}
        answers = [client.chat.completions.create(model=name, **asked) for name in ("tiny", job.fine_tuned_model)]
        assert [answer.model for answer in answers] == ["tiny", job.fine_tuned_model]
        with pytest.raises(openai.NotFoundError):
            other.chat.completions.create(model=job.fine_tuned_model, **asked)
        with pytest.raises(openai.NotFoundError):
            other.fine_tuning.jobs.retrieve(job.id)
        assert client.models.delete(job.fine_tuned_model).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=job.fine_tuned_model, **asked)


def test_the_health_is_that_of_all_parts(server):
    import httpx2

    assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}
