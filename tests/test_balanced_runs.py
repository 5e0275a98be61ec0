"""Whole runs of mixtures that even out the load of their experts: metrics, what is kept of a run, other optimizers."""

import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.runs import write_model, write_rows

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.train import train
from ftjax.training import metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("balanced")
    for family in ("mixtral", "deepseek_v3"):
        write_model(path / family, **{key: value for key, value in CONFIGS[family].items() if "vocab" not in key})
    write_rows(path / "train.jsonl", 40)
    write_rows(path / "eval.jsonl", 8, seed=1)
    return path


def config_of(root, family, **changes):
    config = configs.defaults()
    config.model.source, config.adapter.kind = str(root / family), "none"
    config.data.train, config.data.eval = (str(root / "train.jsonl"),), (str(root / "eval.jsonl"),)
    config.data.max_length, config.data.batch_size, config.accumulate = 64, 4, 1
    config.data.checks = "off"  # the rows that are held out are among the trained ones
    config.evaluate.general, config.steps, config.log_every = (), 3, 1
    config.optimizer.learning_rate = 1e-3
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_says_how_experts_are_loaded_and_its_loss_has_what_is_added(root, tmp_path):
    changes = {"objective.router_balance": 0.1, "objective.router_z_loss": 0.01}
    assert train(config_of(root, "mixtral", **changes), tmp_path) == 0
    records = metrics.read(tmp_path / "metrics.jsonl")
    step = next(record for record in records if record["step"] == 1)
    added = 0.1 * step["router_balance"] + 0.01 * step["router_z"]
    assert step["loss"] == pytest.approx(step["cross_entropy"] + added, rel=1e-5)
    assert step["router_load"] >= 1
    assert 0 <= step["router_idle"] < 1
    held_out = next(record for record in records if "eval_loss" in record)
    assert held_out["eval_loss"] > held_out["eval_cross_entropy"]
    # Of each micro-batch: with another number of these it would be another run.
    again = config_of(root, "mixtral", **changes, accumulate=2, steps=4)
    with pytest.raises(UserError, match="accumulate: 1 -> 2"):
        train(again, tmp_path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_corrections_move_beside_every_optimizer(root, tmp_path, name):
    changes = {"objective.router_bias_rate": 0.01, "optimizer.name": name, "optimizer.l2_sp": 0.1}
    changes |= {"optimizer.ema_decay": 0.5, "optimizer.groups": (("embed", 0.5),)}
    assert train(config_of(root, "deepseek_v3", **changes), tmp_path) == 0
    records = [record for record in metrics.read(tmp_path / "metrics.jsonl") if "loss" in record]
    assert np.isfinite([record["grad_norm"] for record in records]).all()
    assert "cross_entropy" not in records[0]  # nothing is added to the loss
    assert train(config_of(root, "deepseek_v3", **changes, steps=4), tmp_path) == 0, "it goes on"


def test_a_group_that_means_corrections_alone_is_refused(root, tmp_path):
    changes = {"objective.router_bias_rate": 0.01, "optimizer.groups": (("correction", 0.5),)}
    with pytest.raises(UserError, match="matches no parameter"):
        train(config_of(root, "deepseek_v3", **changes), tmp_path)
