"""Runs whose model writes what it learns from, killed or told to stop at any moment: they end with the same bits."""

import os
import shutil
import signal
import time

import pytest
from support.pairs import config_of, write_pairs
from support.rollouts import config_for
from support.runs import command, finish, signal_at_step, write_model, write_rows

from ftjax import config as configs
from ftjax import rollouts, train
from ftjax.errors import UserError
from ftjax.sampling.engine import Engine
from ftjax.training import digest, metrics

TIMES = {"step_time", "tokens_per_second", "data_wait", "eps"}
PAIRS = {"data.row_length": 128, "data.batch_size": 2}
GKD = {"objective.name": "gkd", "objective.rewards": (), "rollouts.samples": 8, "data.batch_size": 4}
PPO = {"objective.name": "ppo", "objective.kl_coef": 0.1, "objective.kl_target": 0.5, "rollouts.iterations": 2}
REWARDED = {  # by a reward model, whose numbers are normalized
    "ppo": PPO | {"data.batch_size": 12},
    "online_dpo": PAIRS | {"objective.name": "online_dpo"},
}
CHANGES = REWARDED | {
    "grpo": {"rollouts.ahead": 1, "objective.correction": "token_truncate", "optimizer.ema_decay": 0.5},
    "rloo": {"objective.name": "rloo", "rollouts.resample": 1},
    "rejection": PAIRS | {"objective.name": "rejection", "data.row_length": 64},
    "gkd": GKD,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_model(root / "model")
    write_model(root / "teacher", hidden_size=48, intermediate_size=64)
    write_rows(root / "rows.jsonl", 40)
    return root


@pytest.fixture(scope="module")
def reward(root):
    write_pairs(root / "pairs.jsonl", 24)
    config = config_of(root, **{"objective.name": "reward", "data.checks": "off", "steps": 3})
    assert train.train(config, root / "reward") == 0
    return ((f"reward:{root / 'reward'}", 2.0),)


def config_file(root, path, **changes):
    config = config_for(root, **{"steps": 6, **changes})
    configs.write(config, path)
    return config


def result(workdir):
    """All that a run made: what is saved at its end, its metrics, and what it wrote."""
    records = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in metrics.read(workdir / "metrics.jsonl")
    ]
    written = workdir / rollouts.FILE
    text = written.read_text() if written.exists() else ""
    return digest.read(workdir / "checkpoints/6")["leaves"], records, text


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_killed_again_and_again_it_ends_with_the_same_bits(root, tmp_path, request, name):
    changes = dict(CHANGES[name])
    if name == "gkd":
        changes["objective.teacher"] = str(root / "teacher")
    if name in REWARDED:
        changes["objective.rewards"] = request.getfixturevalue("reward")
    config_file(root, tmp_path / "run.json", **changes)
    given = ("ftjax.train", f"--config={tmp_path / 'run.json'}", "--workdir")
    finish(command(*given, str(tmp_path / "whole")))
    for step in (1, 3, 4):
        process = command(*given, str(tmp_path / "killed"))
        signal_at_step(process, tmp_path / "killed", step, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(command(*given, str(tmp_path / "killed")))
    wanted, found = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert len(wanted[1]) == 6
    assert found == wanted


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_reward_model_alone(root, tmp_path, reward):
    """One that was trained further in the same place, as when it is told of more steps."""
    shutil.copytree(root / "reward", tmp_path / "reward")
    changes = {"objective.rewards": (f"reward:{tmp_path / 'reward'}",), "steps": 2, "checkpoint_every": 2}
    config = config_for(root, **changes)
    assert train.train(config, tmp_path / "run") == 0
    config.steps = 4
    further = config_of(root, **{"objective.name": "reward", "data.checks": "off", "steps": 4})
    assert train.train(further, tmp_path / "reward") == 0
    with pytest.raises(UserError, match=r"rewards: reward:.*/reward: this model is not the one that rewarded the run"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["rejection", pytest.param("ppo", marks=pytest.mark.slow)])
def test_sigterm_while_the_model_writes_gives_up_the_round_and_saves(root, tmp_path, monkeypatch, capsys, name):
    """A round of two dispatches and more; the run goes on as if it had not been stopped."""
    changes = CHANGES[name] | {"rollouts.max_new_tokens": 40, "data.max_length": 96, "data.row_length": 96}
    changes |= {"checkpoint_every": 100, "rollouts.batch_size": 2}
    config = config_file(root, tmp_path / "run.json", **changes)
    assert train.train(config, tmp_path / "whole") == 0
    per_round = config.rollouts.iterations
    step, rounds, after = Engine.step, [], []

    def interrupted(self, *given):
        if self not in rounds:
            rounds.append(self)
        out = step(self, *given)
        if len(rounds) == 3:  # in the third round
            after.append(self.busy)
            if len(after) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        assert train.train(config, tmp_path / "stopped") == 75
    assert after == [True]  # nothing further was written
    assert f"SIGTERM: saved step {2 * per_round}; the same command goes on from there" in capsys.readouterr().out
    assert train.train(config, tmp_path / "stopped") == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


def test_sigterm_in_the_first_round_leaves_nothing_to_save(root, tmp_path, monkeypatch, capsys):
    config = config_file(root, tmp_path / "run.json", **CHANGES["rejection"])
    step = Engine.step

    def interrupted(self, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return step(self, *given)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert train.train(config, tmp_path / "stopped") == 75
    assert "SIGTERM: nothing is trained yet; the same command begins again" in capsys.readouterr().out
