"""Whole runs on several devices, and what is said of a mesh that a run cannot have (docs/devices.md)."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import AbstractMesh
from support.runs import command, finish, write_run
from support.tiny import CONFIG, spec

from ftjax import config as configs
from ftjax import preflight, sharding, tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config

MIXTURE = spec_from_config(CONFIG | {"model_type": "mixtral", "num_local_experts": 6})


def check(model, sizes, **changes):
    config = configs.defaults()
    config.model.source = "some/model"
    config.update_from_flattened_dict({"data.max_length": 96, "data.batch_size": 8} | changes)
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    preflight.check_mesh(config, model, mesh)


@pytest.mark.parametrize(
    ("model", "sizes", "changes", "message"),
    [
        (spec(), {"fsdp": 16}, {}, "batch_size=8 in 1 micro-batch(es) is 8 rows, not a multiple of"),
        (
            spec(),
            {"data": 2, "fsdp": 2},
            {"accumulate": 4},
            "data x fsdp x expert = 4; set it to a multiple of 16, such as --config.data.batch_size=16",
        ),
        (spec(), {"context": 5}, {}, "max_length=96 is not a multiple of config.mesh.context=5"),
        (spec(), {"expert": 2}, {}, "config.mesh.expert=2: some/model has no experts to split"),
        (MIXTURE, {"expert": 4}, {}, "config.mesh.expert=4: some/model has 6 experts to split"),
    ],
)
def test_a_mesh_that_does_not_divide_the_work_is_refused(model, sizes, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(model, sizes, **changes)


def test_a_mesh_that_divides_the_work_is_not():
    check(spec(), {"data": 2, "fsdp": 2, "tensor": 3, "context": 4})
    check(MIXTURE, {"fsdp": 4, "expert": 2, "context": 3})


NONE, LION = {"adapter.kind": "none"}, {"optimizer.name": "lion", "optimizer.b2": 0.99}
IDLE = [
    ({"objective.name": "reward", "optimizer.ema_decay": 0.9}, "normalized by are those of the weights as they are"),
    (
        NONE | {"adapter.rank": 8},
        "adapter.rank=8 does nothing with adapter.kind='none'; leave it out, or set --config.adapter.rank=16",
    ),
    (NONE | {"adapter.rank_pattern": (("q_proj", 4),)}, "adapter.rank_pattern=[['q_proj', 4]] does nothing with"),
    (NONE | {"adapter.modules_to_save": ("norm",)}, "adapter.modules_to_save=['norm'] does nothing with"),
    (NONE | {"optimizer.loraplus_ratio": 16.0}, "optimizer.loraplus_ratio=16.0 does nothing with adapter.kind='none'"),
    (
        {"adapter.trainable": "norm"},
        "adapter.trainable='norm' does nothing with adapter.kind='lora'; leave it out, or set --",
    ),
    ({"optimizer.name": "adafactor", "optimizer.b2": 0.95}, "optimizer.b2=0.95 does nothing with optimizer.name='adaf"),
    ({"optimizer.name": "adafactor", "optimizer.momentum_dtype": "bfloat16"}, "momentum_dtype='bfloat16' does nothing"),
    (LION | {"optimizer.eps": 1e-6}, "optimizer.eps=1e-06 does nothing with optimizer.name='lion'"),
    (LION, "learning rate, which is 0.0002 here, such as --config.optimizer.learning_rate=4e-05"),
    ({"schedule.decay_ratio": 0.1}, "schedule.decay_ratio=0.1 does nothing with schedule.name='cosine'"),
    ({"schedule.name": "constant", "schedule.final_ratio": 0.1}, "schedule.final_ratio=0.1 does nothing"),
    (
        {"evaluate.temperature": 0.5},
        "evaluate.temperature=0.5 does nothing with no scored entry in config.data.eval",
    ),
    ({"schedule.warmup_steps": 10, "schedule.warmup_ratio": 0.1}, "both say how long the warm-up is"),
]


@pytest.mark.parametrize(("changes", "message"), IDLE, ids=[message[:30] for _, message in IDLE])
def test_a_setting_that_does_nothing_beside_the_others_is_refused(changes, message):
    config = configs.defaults()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        preflight.check_used(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NONE | {"adapter.trainable": "norm", "optimizer.name": "adafactor", "optimizer.weight_decay": 0.1},
        LION | {"optimizer.learning_rate": 3e-5, "optimizer.momentum_dtype": "bfloat16"},
        {"optimizer.name": "muon", "optimizer.eps": 1e-7, "schedule.name": "wsd", "schedule.decay_ratio": 0.1},
        {"schedule.warmup_steps": 10},
    ],
)
def test_settings_that_do_something_are_not(changes):
    config = configs.defaults()
    config.update_from_flattened_dict(changes)
    preflight.check_used(config)


def test_a_schedule_needs_a_step_at_its_peak():
    config = configs.defaults()
    config.update_from_flattened_dict({"schedule.name": "wsd", "schedule.warmup_steps": 5, "schedule.decay_ratio": 0.5})
    preflight.check_schedule(config, 12)
    with pytest.raises(UserError, match=r"10 steps, of which 5 warm up and 5 .decay_ratio=0.5. fall, and none is left"):
        preflight.check_schedule(config, 10)


def test_a_rank_above_the_width_of_a_layer_is_said():
    widths = {"mlp/up_proj": (32, 48), "self_attn/k_proj": (32, 16), "self_attn/v_proj": (32, 16)}
    for rank, wide in ((16, []), (17, ["k_proj (rank 17, width 16), v_proj"]), (33, ["k_proj", "up_proj (rank 33"])):
        adapters, said = {}, []
        for module, (rows, columns) in widths.items():
            adapters[f"layers/{module}/lora_a"] = np.zeros((2, rows, rank))
            adapters[f"layers/{module}/lora_b"] = np.zeros((2, rank, columns))
        preflight.check_ranks(tree.unflatten(adapters), SimpleNamespace(say=said.append))
        assert len(said) == bool(wide)
        assert all(text in said[0] for text in wide)


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "eval_loss") if name in record]


def test_a_run_over_four_devices_offloaded_and_split_along_the_rows(tmp_path):
    config = ["ftjax.train", f"--config={write_run(tmp_path)}", "--config.steps=4", "--config.eval_every=2"]
    finish(command(*config, f"--workdir={tmp_path / 'one'}"))
    split = ["mesh.fsdp=1", "mesh.tensor=2", "mesh.context=2", "model.remat=offload", "model.attention=splash"]
    split = [f"--config.{change}" for change in split]
    said = finish(command(*config, *split, f"--workdir={tmp_path / 'four'}", devices=4))
    assert "tensor=2 x context=2" in said
    assert "splash is for tpu devices, and these are cpu" in " ".join(said.split())
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == 4 + 3
    np.testing.assert_allclose(four, one, rtol=1e-5)
