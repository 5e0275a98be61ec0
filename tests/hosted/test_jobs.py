"""/v1/fine_tuning/jobs, asked by OpenAI's own client; what the jobs run takes hardly any time."""

import contextlib
import csv
import errno
import io
import json

import openai
import pytest
from support.jobs import serving
from support.plain_hosted import client_of, until

from ftjax.errors import UserError
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.requests import NewJob


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(server):
    with client_of(server.url) as client:
        yield client


def ended(client, job):
    """The job once it is final."""
    final = ("succeeded", "failed", "cancelled")
    return until(lambda: (now := client.fine_tuning.jobs.retrieve(job.id)).status in final and now)


def messages(client, job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]


def test_a_job_runs_from_its_file_to_a_model(server, client):
    given = {"training_file": server.plan(), "suffix": "mine", "seed": 7, "metadata": {"for": "tests"}}
    job = client.fine_tuning.jobs.create(model="tiny", **given)
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "validating_files", "tiny", 7)
    assert job.hyperparameters.n_epochs == "auto"
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None, None, None, None)
    assert (job.training_file, job.validation_file, job.metadata) == (given["training_file"], None, {"for": "tests"})
    job = ended(client, job)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny:alice:mine:{job.id[6:14]}"
    assert job.finished_at >= job.created_at
    assert job.trained_tokens == 40
    assert job.method.supervised.hyperparameters.to_dict() == job.hyperparameters.to_dict()
    assert job.hyperparameters.to_dict() == {"batch_size": 1, "learning_rate_multiplier": 1.0, "n_epochs": 3}
    assert server.starts(job) == ["start 0", "end"]


def test_events_tell_each_step_once_and_come_newest_first(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(steps=3)))
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # the client turns the pages
    assert all(event.object == "fine_tuning.job.event" and event.id.startswith("ftevent-") for event in events)
    steps = [event.data for event in events if event.type == "metrics"]
    expected = [{"step": step, "train_loss": 1 / step, "train_mean_token_accuracy": 0.5} for step in (3, 2, 1)]
    assert steps == expected
    said = [event.message for event in events if event.type == "message"][::-1]
    assert said == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Checkpoint created at step 3",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert "Step 2/3: training loss=0.5" in [event.message for event in events]


def test_checkpoints_are_those_of_epochs_and_the_last_has_the_models_own_name(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(rows=2, steps=6)))
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [(one.step_number, one.fine_tuned_model_checkpoint) for one in found] == [
        (6, job.fine_tuned_model),
        (4, f"{job.fine_tuned_model}:ckpt-step-4"),
        (2, f"{job.fine_tuned_model}:ckpt-step-2"),
    ]
    assert found[1].metrics.train_loss == 0.25
    assert {one.fine_tuning_job_id for one in found} == {job.id}


def test_a_checkpoint_that_is_deleted_while_its_job_runs_does_not_come_back(server, client):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(rows=2, steps=6, seconds=0.2))
    first = until(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data)[-1]
    client.models.delete(first.fine_tuned_model_checkpoint)
    job = ended(client, job)
    assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(job.id)] == [6, 4]
    adapters = server.folder / "jobs" / job.id / "adapters"
    assert sorted(path.name for path in adapters.iterdir()) == ["step-4", "step-6"]


def test_the_result_file_is_a_table_of_the_steps(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(steps=2)))
    (result,) = job.result_files
    text = server.files.path(server.files.find(result, "alice")).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [(row["step"], row["train_loss"], row["valid_loss"]) for row in rows] == [("1", "1.0", ""), ("2", "0.5", "")]


def test_models_are_listed_found_and_deleted_and_the_base_stays(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan()))
    names = [model.id for model in client.models.list()]
    assert "tiny" in names
    assert job.fine_tuned_model in names
    assert client.models.retrieve(job.fine_tuned_model).owned_by == "alice"
    place = server.jobs.served(job.fine_tuned_model, "alice").adapter
    assert place.is_dir()
    assert client.models.delete(job.fine_tuned_model).deleted
    assert not place.exists()
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(job.fine_tuned_model)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError, match="is the base"):
        client.models.delete("tiny")


def test_a_model_that_was_tuned_is_tuned_further(server, client):
    first = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(), suffix="a"))
    file = server.plan(seconds=0.2)
    second = client.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=file, suffix="b")
    with pytest.raises(openai.BadRequestError, match="goes on from"):
        client.models.delete(first.fine_tuned_model)
    second = ended(client, second)
    assert second.fine_tuned_model.startswith("ft:tiny:alice:b:")
    config = json.loads((server.folder / "jobs" / second.id / "job.json").read_text())
    assert config["adapter.source"].endswith(f"{first.id}/adapters/step-4")


def test_what_is_anothers_is_not_there(server, client):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=server.plan())
    job = ended(client, job)
    with client_of(server.url, "bob") as bob:
        asked = bob.fine_tuning.jobs
        for call in (asked.retrieve, asked.cancel, asked.pause, asked.resume, asked.list_events):
            with pytest.raises(openai.NotFoundError):
                call(job.id)
        with pytest.raises(openai.NotFoundError):
            asked.checkpoints.list(job.id)
        with pytest.raises(openai.NotFoundError):
            bob.models.retrieve(job.fine_tuned_model)
        with pytest.raises(openai.BadRequestError) as caught:
            asked.create(model="tiny", training_file=job.training_file)
        assert caught.value.param == "training_file"
        assert [one.id for one in asked.list()] == []


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"model": "gpt-4o"}, "model", "there is no model 'gpt-4o'"),
        ({"training_file": "file-none"}, "training_file", "there is no file"),
        ({"validation_file": "file-none"}, "validation_file", "there is no file"),
        ({"suffix": "a b"}, "suffix", "part of the model's name"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "not served"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "leave one of them out"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "", "give them in method alone"),
        ({"metadata": {"k" * 65: ""}}, "metadata", "16 keys of 64"),
        ({"extra_body": {"modle": "x"}}, "modle", "not permitted"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_name(server, client, asked, param, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": server.plan()} | asked)
    assert caught.value.status_code in (400, 404)
    assert said in caught.value.message
    assert param in (caught.value.param or "")


def test_a_file_for_something_else_is_refused(server, client):
    file = server.files.add([{}], filename="other.jsonl")
    with pytest.raises(openai.BadRequestError, match="upload it with purpose='fine-tune'"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file)


def test_jobs_are_listed_newest_first_and_by_their_metadata(server):
    with client_of(server.url, "carol") as client:
        make = client.fine_tuning.jobs.create
        made = [
            make(model="tiny", training_file=server.plan("carol"), metadata=metadata)
            for metadata in ({"team": "a", "n": ""}, {"team": "b"}, None, {"team": "a"})
        ]
        ids = [job.id for job in made]
        jobs = client.fine_tuning.jobs
        assert [job.id for job in jobs.list(limit=3)] == ids[::-1]
        assert [job.id for job in jobs.list(metadata={"team": "a"})] == [ids[3], ids[0]]
        assert [job.id for job in jobs.list(metadata={"team": "a", "n": ""})] == [ids[0]]
        assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [ids[2]]
        first = jobs.list(limit=1)
        assert first.has_more
        assert [job.id for job in jobs.list(after=ids[3], limit=1).data] == [ids[2]]
        with pytest.raises(openai.BadRequestError, match="there is no 'ftjob-x' in this list"):
            jobs.list(after="ftjob-x")
        for job in made:
            ended(client, job)


def test_a_file_that_is_not_to_be_trained_on_fails_the_job_with_its_line(server, client):
    file = server.files.write("alice", "fine-tune", "rows.jsonl", [b"not json\n"]).id
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file))
    assert job.status == "failed"
    assert job.fine_tuned_model is None
    assert job.error.to_dict() == {
        "code": "invalid_training_file",
        "message": f"training_file {file}:1: is not JSON",
        "param": "training_file",
    }
    assert messages(client, job)[-1] == f"The job failed: {job.error.message}"


def test_a_run_that_ends_badly_is_started_again_and_goes_on(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(end=1, times=1)))
    assert job.status == "succeeded"
    assert server.starts(job) == ["start 0", "start 1", "end"]
    assert "Training ended with status 1; it goes on from its last checkpoint" in messages(client, job)


def test_a_run_that_always_ends_badly_fails(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(end=1, times=99)))
    assert (job.status, job.error.code, job.error.param) == ("failed", "server_error", None)


def test_a_run_that_a_scheduler_stopped_goes_on(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(end=75, times=5)))
    assert job.status == "succeeded"
    assert server.starts(job)[-1] == "end"


def test_a_canceled_job_saves_and_is_canceled_for_good(server, client):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(steps=500, seconds=0.01))
    until(lambda: any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id)))
    job = client.fine_tuning.jobs.cancel(job.id)
    assert (job.status, job.finished_at is not None) == ("cancelled", True)
    until(lambda: "saved" in server.starts(job)[-1])
    with pytest.raises(openai.BadRequestError) as caught:  # no 409, which the client would try again
        client.fine_tuning.jobs.cancel(job.id)
    assert "is cancelled" in caught.value.message
    until(lambda: server.jobs.find(job.id, "alice").stage == "")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert messages(client, job).count("The job was cancelled") == 1


def test_what_is_canceled_as_the_server_ends_saves_without_it(tmp_path):
    with serving(tmp_path, seconds=0.5) as server, client_of(server.url) as client:
        assert server.jobs.alive
        job = client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(steps=2000, seconds=0.02))
        until(lambda: any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id)))
        client.fine_tuning.jobs.cancel(job.id)
    assert not server.jobs.alive
    until(lambda: "saved" in server.starts(job)[-1])


def test_a_paused_job_goes_on_where_it_was_when_it_is_resumed(server, client):
    job = client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(steps=60, seconds=0.02))
    until(lambda: any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id)))
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: server.jobs.find(job.id, "alice").stage == "")
    saved = int(server.starts(job)[-1].removeprefix("saved "))
    assert 0 < saved < 60
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    job = ended(client, job)
    assert job.status == "succeeded"
    assert server.starts(job) == ["start 0", f"saved {saved}", f"start {saved}", "end"]
    told = [event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.data]
    assert sorted(told) == list(range(1, 61))


def test_permissions_are_none_and_cannot_be_given(server, client):
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan()))
    permissions = client.fine_tuning.checkpoints.permissions
    assert list(permissions.list(job.fine_tuned_model)) == []
    with client_of(server.url) as admin, pytest.raises(openai.PermissionDeniedError, match="no projects"):
        admin.fine_tuning.checkpoints.permissions.create(job.fine_tuned_model, project_ids=["p"])


def test_who_has_many_jobs_waits_for_who_has_few(tmp_path):
    with serving(tmp_path, at_once=1, queued=5) as server, contextlib.ExitStack() as stack:
        alice, bob = (stack.enter_context(client_of(server.url, name)) for name in ("alice", "bob"))
        first = [alice.fine_tuning.jobs.create(model="tiny", training_file=server.plan(seconds=0.3)) for _ in range(5)]

        def go_on():
            while True:  # the first one may run already
                file = server.plan(seconds=0.3)
                first.append(alice.fine_tuning.jobs.create(model="tiny", training_file=file))

        with pytest.raises(openai.RateLimitError, match="5 jobs that wait"):
            go_on()
        later = bob.fine_tuning.jobs.create(model="tiny", training_file=server.plan("bob"))
        for name, job in [(bob, later), *((alice, job) for job in first)]:
            ended(name, job)
        began = [(tmp_path / "jobs" / job.id / "run/environment.json").stat().st_mtime for job in (later, *first)]
        assert began[0] < sorted(began[1:])[-2]  # bob has not waited for all of alice's


def test_a_key_may_run_fewer_jobs_than_the_server(tmp_path):
    with serving(tmp_path, at_once=3, per_key=1) as server, client_of(server.url) as client:
        jobs = [client.fine_tuning.jobs.create(model="tiny", training_file=server.plan(seconds=0.1)) for _ in range(3)]
        running = 0
        while any(job.status not in ("succeeded", "failed") for job in jobs):
            jobs = [client.fine_tuning.jobs.retrieve(job.id) for job in jobs]
            training = [server.jobs.find(job.id, "alice").stage == "train" for job in jobs]
            running = max(running, sum(training))
        assert running == 1


def test_a_key_has_so_much_of_the_disk_and_runs_expire_but_not_models(tmp_path):
    with serving(tmp_path, quota=50) as server, client_of(server.url) as client:
        job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=server.plan()))
        with pytest.raises(openai.PermissionDeniedError, match=r"of 0\.0 MB; delete models") as caught:
            client.fine_tuning.jobs.create(model="tiny", training_file=server.plan())
        assert caught.value.code == "quota_exceeded"
        folder = tmp_path / "jobs" / job.id
        assert server.jobs.bytes_of("alice") > 50
        until(lambda: not (folder / "run/checkpoints").exists())
    with serving(tmp_path, kept=1) as server, client_of(server.url) as client:
        until(lambda: server.jobs.expire() or not (folder / "run").exists())
        assert [path.name for path in folder.iterdir()] == ["adapters"]
        assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
        assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


def test_nothing_remains_of_a_job_that_could_not_be_made(tmp_path, monkeypatch):
    (tmp_path / "jobs/ftjob-killed").mkdir(parents=True)
    (tmp_path / "jobs/ftjob-killed/training.jsonl").touch()
    with serving(tmp_path) as server, client_of(server.url) as client:
        assert list((tmp_path / "jobs").glob("ftjob-*")) == []

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("ftjax.hosted.jobs.jobs.tell", full)
            with pytest.raises(OSError, match="No space left"):
                server.jobs.create(NewJob(model="tiny", training_file=server.plan()), "alice")
        assert list((tmp_path / "jobs").glob("ftjob-*")) == []
        assert client.fine_tuning.jobs.list().data == []


def test_one_server_has_a_folder_for_itself(tmp_path):
    with serving(tmp_path), pytest.raises(UserError, match="in use"), serving(tmp_path):
        pass


def test_settings_that_are_not_a_servers_are_refused(tmp_path):
    for settings, said in (
        ({}, "model.source is missing"),
        ({"modle": 1}, "no config key"),
        ({"seed": 1}, "seed follows"),
    ):
        with pytest.raises(UserError, match=said):
            Jobs(None, None, tmp_path, settings, None)
