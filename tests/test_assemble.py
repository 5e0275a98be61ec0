"""From config to variables: what is trained, in which dtype, and where an adapter goes."""

import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.pairs import config_of
from support.runs import write_model, write_rows
from support.tiny import one_device, spec

from ftjax import assemble, sharding, train, tree
from ftjax import config as configs
from ftjax.assemble import abstract_variables
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.weights import load


def variables(**changes):
    config = configs.defaults()
    config.update_from_flattened_dict(changes)
    model = Decoder(spec(), jnp.bfloat16, jnp.bfloat16)
    abstract, is_trained = abstract_variables(config, model, one_device())
    trained, frozen = tree.partition(abstract, is_trained)
    return tree.flatten(trained), tree.flatten(frozen)


def dtypes(leaves):
    return {str(leaf.dtype) for leaf in leaves.values()}


def test_lora_trains_float32_adapters_beside_a_bfloat16_base():
    trained, frozen = variables(**{"adapter.rank": 4})
    assert {path.rsplit("/", 1)[1] for path in trained} == {"lora_a", "lora_b"}
    assert dtypes(trained) == {"float32"}
    assert dtypes({path: leaf for path, leaf in frozen.items() if path.startswith("params/")}) == {"bfloat16"}


def test_without_an_adapter_what_is_chosen_becomes_float32_and_the_rest_stays():
    trained, frozen = variables(**{"adapter.kind": "none", "adapter.trainable": "layers/mlp"})
    assert set(trained) == {f"params/layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert dtypes(trained) == {"float32"}
    assert dtypes(frozen) == {"bfloat16"}


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "self_attn/[qv]_proj"])
def test_targets_by_name_and_by_pattern(targets):
    trained, _ = variables(**{"adapter.rank": 4, "adapter.targets": targets})
    assert {path.split("/")[3] for path in trained} == {"q_proj", "v_proj"}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in trained.values())


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"adapter.kind": "none", "adapter.rank": 16}, set()),
        ({"adapter.kind": "none", "adapter.rank": 16, "adapter.trainable": "norm"}, {"kernel", "embedding"}),
    ],
)
def test_a_run_is_loaded_without_its_optimizer_and_without_the_weights_it_has_trained(
    changes, read, tmp_path, monkeypatch
):
    """What was trained comes from the checkpoint alone, and only the rest from the base."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 20)
    rows = {"data.train": (str(tmp_path / "rows.jsonl"),), "data.checks": "off", "objective.name": "sft", "steps": 2}
    assert train.train(config_of(tmp_path, **rows, **changes), tmp_path / "run") == 0
    asked, restored = [], []
    array, restore = load._array, assemble.Checkpoints.restore

    def spied(self, abstract, step, **options):
        restored.append(abstract)
        return restore(self, abstract, step, **options)

    monkeypatch.setattr(
        load, "_array", lambda reader, stored, key, leaf: asked.append(key) or array(reader, stored, key, leaf)
    )
    monkeypatch.setattr(assemble.Checkpoints, "restore", spied)
    config, base, variables, _ = assemble.load_run(tmp_path / "run")
    assert [part.keys() for part in restored] == [{"trainable"}]
    trained = set(tree.flatten(restored[0]["trainable"]))
    assert {path.rpartition("/")[2] for path in set(tree.flatten(variables)) - trained} == read
    assert len(asked) == len(tree.flatten(variables)) - len(trained)
    # It is the trained model: every parameter is there, and those that were trained have moved.
    start = tree.flatten(
        assemble.load_variables(config, base, assemble.abstract_variables(config, base.model, one_device())[0])
    )
    loaded = tree.flatten(variables)
    assert loaded.keys() == start.keys()
    for path, leaf in start.items():
        assert np.array_equal(loaded[path], leaf) == (path not in trained), path


def test_the_average_of_what_is_trained_is_evaluated_and_loaded(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 20)
    rows = {key: (str(tmp_path / "rows.jsonl"),) for key in ("data.train", "data.eval")}
    rows |= {"data.checks": "off", "objective.name": "sft", "steps": 2, "checkpoint_every": 1, "checkpoint.keep": 3}
    evaluated = []

    def spied(self, step, trainable, frozen):
        assert "kept" not in frozen
        evaluated.append(jax.device_get(tree.flatten(trainable)))
        return {"eval_loss": 0.0}

    monkeypatch.setattr(train.Evaluator, "__call__", spied)
    config = config_of(tmp_path, **rows, **{"optimizer.ema_decay": 0.5})
    assert train.train(config, tmp_path / "run") == 0
    where = sharding.replicated(one_device())
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for path, leaf in evaluated[0].items()}
    part = {"trainable": tree.unflatten(like)}
    with assemble.Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        steps = [tree.flatten(checkpoints.restore(part, step, partial=True)[1]["trainable"]) for step in (1, 2)]
    loaded = tree.flatten(assemble.load_run(tmp_path / "run")[2])
    for path, leaf in evaluated[-1].items():
        np.testing.assert_array_equal(loaded[path], leaf)
        np.testing.assert_allclose(leaf, (steps[0][path] + 2 * steps[1][path]) / 3, rtol=0, atol=1e-7)
        assert np.abs(leaf - steps[1][path]).max() > 1e-4


def test_the_order_of_the_rows_has_a_seed_of_its_own():
    config = config_of(Path("nowhere"), seed=3)
    assert assemble.data_spec(config, spec()).seed == 3
    config.data.seed = 5
    assert assemble.data_spec(config, spec()).seed == 5


def test_evaluation_comes_every_so_many_steps_or_parts_of_an_epoch():
    loader = types.SimpleNamespace(batches_in=lambda epochs: math.ceil(epochs * 25))
    config = config_of(Path("nowhere"), eval_epochs=0.5)
    assert train.cadence(config, loader, 100).evaluate == 13
    config = config_of(Path("nowhere"), eval_every=7)
    assert train.cadence(config, loader, 100).evaluate == 7
    with pytest.raises(UserError, match=r"eval_every=7 steps and config.eval_epochs=0.5 epochs both"):
        config_of(Path("nowhere"), eval_every=7, eval_epochs=0.5)
