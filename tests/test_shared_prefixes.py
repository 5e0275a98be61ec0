"""Runs whose rows hold what their documents begin with once: the losses, gradients and commands of any other run."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.pairs import begun, config_of, write_labeled, write_pairs
from support.runs import command, finish, write_model, write_rows, write_run
from support.tiny import one_device, spec

from ftjax import assemble, inspect_data, preflight, sharding, tree
from ftjax import config as configs
from ftjax.data import pipeline
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.training.loop import place_batch

SHARED = {"data.share_prefixes": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    write_model(root / "model")
    write_pairs(root / "pairs.jsonl", 24)
    write_labeled(root / "labeled.jsonl", 24)
    write_rows(root / "train.jsonl", 24)
    steps = [["first", f"then {i % 3}", "done"] for i in range(24)]
    graded = [
        {"prompt": f"Question {i // 8}", "completions": its, "labels": [True, i % 3 != 1, i % 2 == 0]}
        for i, its in enumerate(steps)
    ]
    (root / "stepwise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    return root


METHODS = {
    "sft": ("train.jsonl", {}),
    "dpo": ("pairs.jsonl", {}),
    "dpo, a mixture": ("pairs.jsonl", {"objective.loss": ("ipo", ("sft", 0.5)), "objective.ld_alpha": 0.5}),
    "simpo": ("pairs.jsonl", {}),
    "orpo": ("pairs.jsonl", {}),
    "reward": ("pairs.jsonl", {"objective.center_coef": 0.1}),
    "prm": ("stepwise.jsonl", {}),
    "kto": ("labeled.jsonl", {"objective.loss": ("apo_zero_unpaired",)}),
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_documents_that_stand_alone(name, root, record_figure):
    rows, changes = METHODS[name]
    changes |= {
        "objective.name": name.partition(",")[0],
        "data.train": (str(root / rows),),
        "data.row_length": 160,
        "data.batch_size": 24,
    }
    found = [measured(config_of(root, **changes, **more)) for more in ({}, SHARED)]
    (alone, of_alone, held), (shared, of_shared, fewer) = found
    assert fewer < 0.9 * held
    np.testing.assert_allclose(shared, alone, rtol=2e-5)
    differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()), of_shared, of_alone)
    worst = max(jax.tree.leaves(differences))
    record_figure("gradients", worst)
    assert worst < 1e-4


def measured(config):
    """(sums of loss and weight, their gradients, tokens that rows hold), all rows, with adapters that do something."""
    program, start, loader = begun(config)
    loader.shuffle = False
    total, gradients, held = np.zeros(2), None, 0
    moved = jax.tree.map(lambda leaf: leaf + 0.05, start.state.trainable)

    @jax.jit
    def step(trainable, batch):
        def loss(trainable):
            found = program.objective(tree.combine(trainable, start.frozen), batch, None)
            return found.sum, found.weight

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    with jax.set_mesh(one_device()):
        for batch in loader.eval_batches():
            held += (batch["segment_ids"] > 0).sum()
            placed = {key: value[0] for key, value in place_batch(one_device(), batch, 1).items()}
            (loss, weight), of_batch = step(moved, placed)
            total += float(loss), float(weight)
            gradients = of_batch if gradients is None else jax.tree.map(jnp.add, gradients, of_batch)
    return total, jax.device_get(gradients), held


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_learns_resumes_and_does_the_same_on_several_devices(tmp_path):
    config = ["ftjax.train", f"--config={write_run(tmp_path)}", "--config.schedule.name=constant"]
    config += ["--config.data.share_prefixes=True"]
    said = " ".join(finish(command(*config, "--config.steps=8", f"--workdir={tmp_path / 'one'}")).split())
    assert re.search(r"an update, [1-9]\d* tokens that all begin with once in a row", said)
    split = [*config, "--config.mesh.fsdp=2", f"--workdir={tmp_path / 'two'}"]
    finish(command(*split, "--config.steps=4", devices=2))
    finish(command(*split, "--config.steps=8", devices=2))
    one = losses(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), one, rtol=1e-4)
    assert one[-1] < 0.7 * one[0]
    records = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert all(record["shared_tokens"] > 0 for record in records if "loss" in record)


def test_inspection_counts_the_rows_that_training_makes(root, capsys):
    for rows, name in (("pairs.jsonl", "dpo"), ("train.jsonl", "sft")):
        changes = {"objective.name": name, "data.train": (str(root / rows),), "data.batch_size": 0} | SHARED
        config = config_of(root, **changes)
        options = {"rows": 0, "source": None, "max_rows": 0, "tokens_per_second": 0.0, "workdir": None, "html": None}
        assert inspect_data.inspect(config, options | {"json": str(root / "found.json")}) == 0
        found = json.loads((root / "found.json").read_text())
        chosen = {f"data.{key}": found["chosen"][key] for key in ("batch_size", "row_length")}
        _, _, loader = begun(config_of(root, **changes | chosen))
        assert found["epoch"]["rows"] == loader.rows_per_epoch(0)
        held = sum((batch["segment_ids"] > 0).sum() for batch in loader.eval_batches())
        assert found["epoch"]["tokens"] == held
        assert "tokens that all begin with, once in each row" in " ".join(capsys.readouterr().out.split())


def test_rows_that_have_nothing_in_common_are_refused(root):
    config = config_of(root, **{"objective.name": "sft", "data.train": (str(root / "train.jsonl"),)} | SHARED)
    config.data.train_on = "all"
    _, _, loader = begun(config)
    with pytest.raises(
        UserError, match=r"begin with nothing in common that is not trained \(config.data.train_on='all'"
    ):
        pipeline.sizes(loader.examples, pipeline.DataSpec("conversation", 48, 4, True, "all", 400, shares=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train_on": "all"}, r"begin with nothing in common that is not trained"),
        ({"model.neftune_alpha": 5.0}, r"gets noise by the length of a document"),
    ],
)
def test_inspection_refuses_what_training_does(root, changes, message):
    config = config_of(root, **{"objective.name": "sft", "data.train": (str(root / "train.jsonl"),)} | SHARED | changes)
    options = {"rows": 0, "source": None, "max_rows": 0, "tokens_per_second": 0.0, "workdir": None}
    with pytest.raises(UserError, match=message):
        inspect_data.inspect(config, options | {"html": None, "json": None})


def test_held_out_pairs_that_fit_by_sharing_have_rows_of_the_same_length(root):
    config = config_of(root, **{"data.row_length": 80} | SHARED)
    base = assemble.open_base(config.model, config.data)
    entries, spec = configs.sources(config, "train"), assemble.data_spec(config, base.model.spec)
    for shares, length in ((True, 80), (False, 96)):
        loader = pipeline.load_heldout(entries, [], base.tokenizer, dataclasses.replace(spec, shares=shares))
        assert loader.max_length == length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.packing": False}, "data.share_prefixes=True does nothing with data.packing=False"),
        (
            {"objective.name": "classify", "objective.classes": ("no", "yes")},
            "objective.name='classify', all tokens of whose documents count as trained",
        ),
        ({"objective.name": "grpo"}, "objective.name='grpo', whose batches are made while training"),
        (
            {"objective.name": "reward", "objective.ensemble": 4},
            "objective.ensemble, whose bootstraps know a pair by all",
        ),
        ({"objective.name": "kto"}, "objective.name='kto' and this loss, whose prompts with other completions are"),
    ],
)
def test_settings_that_it_does_nothing_with_are_refused(changes, message):
    config = configs.defaults()
    config.update_from_flattened_dict(SHARED | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        preflight.check_used(config)


@pytest.mark.parametrize(
    ("model", "sizes", "changes", "message"),
    [
        (spec_from_config(CONFIGS["qwen3_next"]), {}, {}, "carries a memory from token to token"),
        (spec_from_config(CONFIGS["llama4"]), {}, {}, "has attention in chunks"),
        (
            spec_from_config(CONFIGS["phi3"]),
            {},
            {"data.max_length": 512},
            "(LongRoPE), as those of config.data.max_length=512",
        ),
        (
            spec(),
            {},
            {"model.neftune_alpha": 5.0},
            "gets noise by the length of a document (config.model.neftune_alpha)",
        ),
        (
            spec(),
            {},
            {"objective.router_balance": 0.1},
            "counts every token for its experts (config.objective.router_ba",
        ),
        (spec(), {"context": 2}, {}, "splits rows over devices (config.mesh.context)"),
    ],
)
def test_models_whose_documents_would_be_others_are_refused(model, sizes, changes, message):
    config = configs.defaults()
    config.update_from_flattened_dict({"data.max_length": 96} | SHARED | changes)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    with pytest.raises(UserError, match=re.escape(message)):
        preflight.check_sharing(config, model, mesh)
    config.data.share_prefixes = False
    preflight.check_sharing(config, model, mesh)
