"""What a config leaves open is chosen, recorded, kept when the run goes on, and the same in inspection."""

import json
import re
import types

import pytest
from jax.sharding import AbstractMesh
from support.pairs import write_pairs
from support.runs import write_model, write_rows
from support.tiny import one_device, spec

from ftjax import choices, config_changes, config_files, inspect_data, origin, resume, sharding
from ftjax import config as configs
from ftjax.data.batch.sizes import FEW_UPDATES
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator
from ftjax.models.published import find
from ftjax.plan import model_spec
from ftjax.train import train
from ftjax.training.preemption import Preempted

ROWS = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("open")
    write_model(path / "model")
    write_rows(path / "train.jsonl", ROWS)
    write_rows(path / "eval.jsonl", 8, seed=1)
    write_pairs(path / "pairs.jsonl", 12)
    return path


def config_of(root, **changes):
    """A config with nothing set but model, data and what a test needs to be small."""
    config = configs.defaults()
    files = {"model.source": str(root / "model"), "data.train": (str(root / "train.jsonl"),)}
    small = {"data.max_length": 96, "data.checks": "off", "adapter.rank": 4, "mesh.fsdp": 1, "evaluate.general": ()}
    return configs.changed(config, files | small | {"checkpoint_every": 1000} | changes)


def test_dtypes_follow_the_devices_unless_they_are_given():
    def of(platform, **given):
        model = choices.by_devices(configs.changed(configs.defaults(), given), platform).model
        return model.dtype, model.param_dtype

    assert of("cpu") == ("float32", "float32")
    assert of("gpu") == of("tpu") == ("bfloat16", "bfloat16")
    assert of("cpu", **{"model.dtype": "bfloat16"}) == ("bfloat16", "bfloat16")
    assert of("cpu", **{"model.param_dtype": "bfloat16"}) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("width", "published"), [(4096, 2e-4), (5120, 2e-4), (8192, 1e-4), (576, 1e-3)], ids=["7B", "13B", "65B", "135M"]
)
def test_adapters_of_narrow_models_learn_faster(width, published):
    """QLoRA's learning rates, and that of the quickstart's model."""
    model = spec(hidden_size=width)
    chosen = choices.by_model(configs.defaults(), model).optimizer.learning_rate
    assert chosen == pytest.approx(published, rel=0.2)
    full = configs.changed(configs.defaults(), {"adapter.kind": "none"})
    assert choices.by_model(full, model).optimizer.learning_rate == 2e-5
    given = configs.changed(configs.defaults(), {"optimizer.learning_rate": 3e-3})
    assert choices.by_model(given, model).optimizer.learning_rate == 3e-3


@pytest.mark.parametrize("given", [{"epochs": 0.3}, {"data.batch_size": 16}, {"data.batch_size": 16, "epochs": 2.0}])
def test_what_is_said_of_few_updates_makes_enough(root, capsys, given):
    """Each of the hints, taken."""
    said = inspected(config_of(root, **given), capsys)[1]
    hints = re.search(r"warning: (\d+) updates .* epochs are few to learn from; (.*) makes 50 or more", said)
    assert int(hints[1]) < FEW_UPDATES
    for hint in hints[2].split(" or "):
        changes = dict(word.removeprefix("--config.").split("=") for word in hint.split())
        changes = {key: float(value) if key == "epochs" else int(value) for key, value in changes.items()}
        steps, said = inspected(config_of(root, **given | changes), capsys)
        assert steps >= FEW_UPDATES, hint
        assert "few to learn from" not in said


def inspected(config, capsys):
    """(steps, what was printed) of inspection."""
    names = ("rows", "source", "max_rows", "tokens_per_second", "workdir", "html")
    options = dict.fromkeys(names, 0) | {"source": None, "json": f"{config.model.source}/report.json"}
    assert inspect_data.inspect(config, options) == 0
    with open(options["json"]) as file:
        return json.load(file)["epoch"]["steps"], capsys.readouterr().out


def test_a_run_with_nothing_set_records_what_it_chose_and_goes_on_with_it(root, tmp_path, monkeypatch, capsys):
    evaluated = {"data.eval": (str(root / "eval.jsonl"),), "evaluate.before": False, "eval_every": 2}
    changes = {"epochs": 0.2} | evaluated
    measure = Evaluator.__call__

    def interrupted(self, step, *variables):
        raise Preempted

    steps, _ = inspected(config_of(root, epochs=0.2), capsys)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        assert train(config_of(root, **changes), tmp_path) == 75
    said = capsys.readouterr().out
    assert f"chosen for {ROWS} examples" in said
    assert f"{steps} (" in said  # as inspection has it
    assert "nothing is computed twice" in said
    recorded = configs.flat(configs.read(tmp_path / "config.json"))
    assert [key for key in configs.OPEN if recorded[key] == configs.KEYS[key].default] == []
    # Another choice of today's is no reason to refuse, and is not taken.
    monkeypatch.setattr(Evaluator, "__call__", measure)
    monkeypatch.setattr(choices.sizes, "SEEN", 20_000)
    monkeypatch.setattr(choices, "_POWER", 0.0)
    with pytest.raises(UserError, match=rf"data.batch_size: {recorded['data.batch_size']} -> 32"):
        train(config_of(root, **changes, **{"data.batch_size": 32}), tmp_path)
    assert train(config_of(root, **changes), tmp_path) == 0
    assert configs.flat(configs.read(tmp_path / "config.json")) == recorded
    assert f"step {steps}/{steps}" in capsys.readouterr().out


def test_a_run_that_is_older_than_the_choices_means_what_it_did():
    """Rows of max_length where a batch is recorded and no row length, and the method's learning rate at any width."""
    old = configs.changed(configs.defaults(), {"data.batch_size": 16, "epochs": 1.0, "model.dtype": "bfloat16"})
    old = configs.changed(old, {"accumulate": 1, "model.remat": "none", "model.param_dtype": "bfloat16"})
    config = configs.with_recorded(configs.defaults(), old)
    assert config_changes.changes(old, config) == []
    assert choices.assemble.data_spec(config, spec()).row_length == 1024
    assert (config.model.dtype, config.epochs, config.accumulate) == ("bfloat16", 1.0, 1)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 4), (2, 4), (8, 0)])
def test_micro_batches_that_another_mesh_does_not_allow_are_chosen_anew(tmp_path, devices, accumulate):
    files = {"model.source": "m", "data.train": ("rows.jsonl",)}
    chosen = {"data.batch_size": 8, "accumulate": 4, "epochs": 3.0, "optimizer.learning_rate": 1e-4}
    recorded = configs.changed(configs.defaults(), files | chosen)
    configs.write(recorded, tmp_path / "config.json")
    checkpoints = types.SimpleNamespace(latest=lambda: 20)
    mesh = AbstractMesh(tuple(devices if axis == "fsdp" else 1 for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    config, _ = resume.find(configs.changed(configs.defaults(), files), mesh, tmp_path, checkpoints)
    assert (config.data.batch_size, config.epochs, config.accumulate) == (8, 3.0, accumulate)
    assert config_changes.changes(configs.read(tmp_path / "config.json"), config) == []
    # What is given stays, and is refused by the mesh itself where it does not divide.
    given = configs.changed(configs.defaults(), files | {"accumulate": 2})
    assert resume.find(given, mesh, tmp_path, checkpoints)[0].accumulate == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulate": 3}, "data.batch_size=8 is not a multiple of config.accumulate=3"),
        ({"steps": 4, "epochs": 9.0}, "config.steps=4 decides how long this run is"),
    ],
)
def test_what_does_not_go_with_what_was_chosen_is_refused(tmp_path, given, message):
    files = {"model.source": "m", "data.train": ("rows.jsonl",), "steps": given.get("steps", 0)}
    chosen = {"data.batch_size": 8, "accumulate": 4, "epochs": 3.0, "optimizer.learning_rate": 1e-4}
    configs.write(configs.changed(configs.defaults(), files | chosen), tmp_path / "config.json")
    checkpoints = types.SimpleNamespace(latest=lambda: 4)
    with pytest.raises(UserError, match=message):
        resume.find(configs.changed(configs.defaults(), files | given), one_device(), tmp_path, checkpoints)


def test_what_a_run_chose_is_open_again_where_its_config_serves_for_another(tmp_path):
    given = configs.changed(configs.defaults(), {"model.source": "m", "epochs": 5.0})
    found = configs.changed(given, {"optimizer.learning_rate": 9e-4, "data.batch_size": 4, "accumulate": 2})
    configs.write(found, tmp_path / "config.json")
    origin.record(tmp_path, given, found, {})
    origin.record(tmp_path, found, found, {}, fresh=False)  # a resume by other words changes nothing about it
    config = config_files.load(str(tmp_path / "config.json"))
    assert (config.optimizer.learning_rate, config.data.batch_size, config.accumulate, config.epochs) == (0, 0, 0, 5)


def test_scores_of_other_evaluation_rows_are_said():
    before = configs.changed(configs.defaults(), {"data.eval": ("/a.jsonl",)})
    assert resume.other_evaluation(before, configs.changed(before, {"data.eval": ["/a.jsonl"]})) == ""
    said = resume.other_evaluation(before, configs.changed(before, {"data.eval": ("/b.jsonl",)}))
    assert "where its rows are others, the next evaluation begins anew" in said


def test_a_run_that_left_its_learning_rate_open_keeps_it(tmp_path):
    """Older runs recorded 0, and took the method's own whatever the width of the model."""
    files = {"model.source": "m", "data.train": ("rows.jsonl",)}
    recorded = configs.changed(configs.defaults(), files | {"data.batch_size": 8, "accumulate": 1, "epochs": 1.0})
    configs.write(recorded, tmp_path / "config.json")
    checkpoints = types.SimpleNamespace(latest=lambda: 20)
    config, _ = resume.find(configs.changed(configs.defaults(), files), one_device(), tmp_path, checkpoints)
    assert config.optimizer.learning_rate == 2e-4


def test_a_plan_without_data_takes_full_rows(root):
    model = model_spec("meta-llama/Llama-3.1-8B")
    assert find("meta-llama/Llama-3.1-8B")
    config = configs.changed(configs.defaults(), {"mesh.fsdp": 1})
    chosen = choices.without_data(config, model, one_device(), None)
    assert (chosen.data.batch_size, chosen.data.row_length, chosen.epochs) == (16, 1024, 3.0)
    assert (chosen.model.remat, chosen.accumulate) == ("none", 1)  # unknown memory
    pairs = configs.changed(config, {"objective.name": "dpo", "accumulate": 3})
    chosen = choices.without_data(pairs, model, one_device(), None)
    assert (chosen.data.batch_size, chosen.data.row_length, chosen.epochs) == (15, 2048, 1.0)


def test_a_row_shorter_than_an_example_is_refused(root, tmp_path):
    with pytest.raises(
        UserError, match=r"config.data.row_length=8: the longest example has \d+ tokens; set --config.data.row_length"
    ):
        train(config_of(root, **{"data.row_length": 8}), tmp_path)
