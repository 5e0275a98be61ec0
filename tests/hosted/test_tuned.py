"""Jobs whose runs are real ones, of a small random model: what a client asked for is what the run did."""

import json
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file
from support.plain_hosted import PlainFiles, application, client_of, served, until
from support.runs import write_model

from ftjax.hosted import models
from ftjax.hosted.database import connect
from ftjax.hosted.jobs.backend import Local
from ftjax.hosted.jobs.jobs import Jobs
from ftjax.hosted.jobs.routes import routes
from ftjax.hosted.models import Trained
from ftjax.training import metrics


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    settings = {
        "model.source": str(write_model(folder / "model")),
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.max_length": 96,
        "mesh.fsdp": 1,
        "rollouts.max_new_tokens": 16,
    }
    files, engine = PlainFiles(folder / "files"), connect(f"sqlite:///{folder}/server.db")
    trained = Trained(engine, "tiny")
    here = Local({"JAX_PLATFORMS": "cpu"})
    with (
        Jobs(engine, files, folder / "jobs", settings, trained, here, seconds=0.1) as jobs,
        served(application(routes(jobs), models.routes(trained))) as url,
        client_of(url) as client,
    ):
        yield SimpleNamespace(folder=folder, files=files, client=client, jobs=jobs)
    engine.dispose()


def ended(client, job):
    final = ("succeeded", "failed", "cancelled")
    return until(lambda: (now := client.fine_tuning.jobs.retrieve(job.id)).status in final and now, 600)


def rows(first, last):
    """Conversations that are all different."""
    colors = ("blue", "red", "green", "brown")
    for number in range(first, last):
        color = colors[number % 4]
        question = {"role": "user", "content": f"The {color} lamp of room {number} is broken"}
        yield {"messages": [question, {"role": "assistant", "content": f"send {color} to {number}"}]}


def pairs(first, last):
    """The same as OpenAI's rows of preferences."""
    for row in rows(first, last):
        question, answer = row["messages"]
        worse = {"role": "assistant", "content": "no idea"}
        yield {"input": {"messages": [question]}, "preferred_output": [answer], "non_preferred_output": [worse]}


def run_of(server, job):
    return server.folder / "jobs" / job.id / "run"


def test_a_supervised_job_trains_evaluates_and_leaves_adapters_of_its_epochs(server):
    client = server.client
    train, heldout = server.files.add(list(rows(0, 24))), server.files.add(list(rows(40, 44)))
    asked = {"batch_size": 6, "n_epochs": 2, "learning_rate_multiplier": 3}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=train,
        validation_file=heldout,
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},
        seed=3,
    )
    job = ended(client, job)
    assert job.status == "succeeded", job.error
    assert job.hyperparameters.to_dict() == asked
    config = json.loads((run_of(server, job) / "config.json").read_text())
    assert (config["seed"], config["epochs"], config["data"]["batch_size"]) == (3, 2.0, 6)
    assert config["data"]["row_length"] == 64  # of the longest row, not of the longest that may be
    usual = 2e-4 * (4096 / 512) ** 0.78  # of LoRA at this width (docs/methods.md)
    assert config["optimizer"]["learning_rate"] == pytest.approx(3 * float(f"{usual:.2g}"))

    records = metrics.read(run_of(server, job) / "metrics.jsonl")
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(losses) == list(range(1, 9))
    assert job.trained_tokens == records[-2]["num_tokens"]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    told = {event.data["step"]: event.data for event in events if event.data and "train_loss" in event.data}
    assert {step: data["train_loss"] for step, data in told.items()} == losses
    evaluated = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(evaluated) == [4, 8]

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [one.step_number for one in checkpoints] == [8, 4]
    assert [one.metrics.full_valid_loss for one in checkpoints] == [evaluated[8], evaluated[4]]
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    places = [server.jobs.served(one.fine_tuned_model_checkpoint, "alice").adapter for one in checkpoints]
    weights = [load_file(place / "adapter_model.safetensors") for place in places]
    assert weights[0].keys() == weights[1].keys()
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    until(lambda: not (run_of(server, job) / "checkpoints").exists())  # which are larger, and no more needed


@pytest.mark.slow
def test_auto_is_what_the_project_chooses_for_so_many_rows_and_seeds_repeat(server):
    client, file = server.client, server.files.add(list(rows(0, 16)))
    first, second = (client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=5) for _ in range(2))
    first, second = ended(client, first), ended(client, second)
    assert first.status == second.status == "succeeded"
    config = json.loads((run_of(server, first) / "config.json").read_text())
    values = first.hyperparameters
    assert (values.batch_size, values.n_epochs) == (config["data"]["batch_size"], config["epochs"])
    assert values.n_epochs == 13  # 200 examples seen
    assert values.learning_rate_multiplier == 1.0
    same = [
        [record["loss"] for record in metrics.read(run_of(server, job) / "metrics.jsonl")] for job in (first, second)
    ]
    assert same[0] == same[1]


@pytest.mark.slow
def test_a_dpo_job_learns_from_openais_rows(server):
    client = server.client
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": 4}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=server.files.add(list(pairs(0, 8))), method=method)
    job = ended(client, job)
    assert job.status == "succeeded", job.error
    assert job.method.dpo.hyperparameters.to_dict() == {
        "beta": 0.3,
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
    }
    config = json.loads((run_of(server, job) / "config.json").read_text())
    assert config["objective"]["name"] == "dpo"
    assert config["objective"]["beta"] == 0.3
    first = metrics.read(run_of(server, job) / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy is still its reference
    steps = [event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.data]
    assert [data["step"] for data in steps] == [4, 3, 2, 1]
    assert all("train_accuracy" in data for data in steps)


@pytest.mark.parametrize(
    ("train", "heldout", "param", "said"),
    [
        ([{"messages": [{"role": "user", "content": "Hm?"}]}], None, "training_file", "{train}:1: "),
        ([*rows(0, 3), {"messages": "none"}], None, "training_file", "{train}:4: messages must be"),
        ([*rows(0, 3), {"message": []}], None, "training_file", "{train}:4: "),
        ([*rows(0, 8)], [*rows(4, 8)], "validation_file", "{heldout}:1"),
        ([*rows(0, 8)], [{"messages": 1}], "validation_file", "{heldout}:1: messages must be"),
        ([], None, "training_file", "no rows"),
    ],
)
def test_rows_that_are_not_to_be_trained_on_fail_the_job_with_their_place(server, train, heldout, param, said):
    files = {"training_file": server.files.add(train)}
    files |= {} if heldout is None else {"validation_file": server.files.add(heldout)}
    job = ended(server.client, server.client.fine_tuning.jobs.create(model="tiny", **files))
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == (f"invalid_{param}", param)
    places = {"train": files["training_file"], "heldout": files.get("validation_file")}
    assert said.format(**places) in job.error.message
    assert str(server.folder) not in job.error.message


@pytest.mark.slow
def test_a_reinforcement_job_is_rewarded_by_its_grader(server):
    source = "def grade(sample, item):\n    return sample['output_text'].count(item['letter']) / 10"
    grader = {"type": "python", "name": "letters", "source": source}
    asked = {"n_epochs": 1, "batch_size": 4, "compute_multiplier": 0.5}
    prompts = [{"messages": row["messages"][:1], "letter": "e"} for row in rows(0, 8)]
    job = server.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=server.files.add(prompts),
        validation_file=server.files.add([{"messages": row["messages"][:1], "letter": "e"} for row in rows(20, 24)]),
        method={"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": asked}},
    )
    job = ended(server.client, job)
    assert job.status == "succeeded", job.error
    assert job.method.reinforcement.grader.to_dict() == grader
    config = json.loads((run_of(server, job) / "config.json").read_text())
    assert (config["objective"]["name"], config["rollouts"]["samples"], config["data"]["batch_size"]) == ("grpo", 4, 16)
    records = metrics.read(run_of(server, job) / "metrics.jsonl")
    rewards = {record["step"]: record["reward"] for record in records if "reward" in record}
    events = [event.data for event in server.client.fine_tuning.jobs.list_events(job.id) if event.data]
    assert {one["step"]: one["train_mean_reward"] for one in events if "train_mean_reward" in one} == rewards
    assert list(rewards) == [1, 2]
    assert [one["step"] for one in events if "full_valid_mean_reward" in one] == [2]


@pytest.mark.slow
def test_a_row_that_lacks_what_the_grader_names_fails_the_job(server):
    grader = {"type": "string_check", "name": "x", "input": "{{ sample.output_text }}", "operation": "eq"}
    method = {"type": "reinforcement", "reinforcement": {"grader": grader | {"reference": "{{ item.answer }}"}}}
    file = server.files.add([{"messages": row["messages"][:1]} for row in rows(0, 4)])
    job = ended(server.client, server.client.fine_tuning.jobs.create(model="tiny", training_file=file, method=method))
    assert (job.status, job.error.code) == ("failed", "invalid_training_file")
    assert f"training_file {file}:1: " in job.error.message
    assert "item.answer" in job.error.message
    assert str(server.folder) not in job.error.message
