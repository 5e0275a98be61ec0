"""The page on methods: its table is that of the code, and its commands run one after the other."""

import re
import shlex

import pytest
from support import ROOT
from support.pairs import write_labeled, write_pairs
from support.runs import command, finish, write_model, write_rows

from ftjax import config as configs
from ftjax.method import METHODS
from ftjax.training import metrics

PAGE = (ROOT / "docs/methods.md").read_text()
COMMANDS = [shlex.split(line)[2:] for line in re.findall(r"^ {4}(python -m ftjax.+)$", PAGE, re.MULTILINE)]
SMALL = ("--config.data.batch_size=4", "--config.data.max_length=64", "--config.steps=2", "--config.mesh.fsdp=1")
SMALL += ("--config.data.checks=off", "--config.adapter.rank=4", "--config.model.dtype=float32", "--config.log_every=1")


def test_the_table_has_every_method_with_its_settings_and_learning_rates():
    rows, line = {}, r"^\| `(\w+)` \|[^|]*\|([^|]*)\| ([\de-]+, [\de-]+) \|$"
    for name, settings, rates in re.findall(line, PAGE, re.MULTILINE):
        rows[name] = (re.findall(r"`(\w+)` \(([\w.\\-]*)\)", settings), *map(float, rates.split(", ")))
    defaults = configs.defaults().objective
    for name, method in METHODS.items():
        rates = method.learning_rates["lora"], method.learning_rates["none"]
        assert rows.pop(name) == ([(key, shown(defaults[key])) for key in method.settings], *rates)
    assert not rows


def shown(value):
    return repr(value).strip("()'")


@pytest.mark.slow
def test_supervised_tuning_then_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 60)
    write_pairs(tmp_path / "pairs.jsonl", 60)
    page = (ROOT / "docs/reinforcement.md").read_text().split("## Several turns")[0]
    for line in re.findall(r"^ {4}(python -m ftjax.+MODEL.+|python -m ftjax.export.+)$", page, re.MULTILINE):
        arguments = shlex.split(line.replace("MODEL", "model").replace("configs/", f"{ROOT}/configs/"))[2:]
        small = SMALL if arguments[0] == "ftjax.train" else ()
        if "pairs.jsonl" in line:
            small = [*small, "--config.data.max_length=48", "--config.data.row_length=96"]
        if "--config configs/ppo.py" in line:
            small = [word for word in small if "adapter.rank" not in word and "steps" not in word]
            small += ["--config.steps=8", "--config.rollouts.max_new_tokens=8"]
        if "--config configs/grpo.py" in line:
            small = [word for word in small if "adapter.rank" not in word and "batch_size" not in word]
            small += ["--config.data.batch_size=8", "--config.rollouts.samples=4", "--config.rollouts.max_new_tokens=8"]
        finish(command(*arguments, *small))
    records = metrics.read(tmp_path / "runs/grpo/metrics.jsonl")
    assert ["reward" in record for record in records] == [True, True]
    records = metrics.read(tmp_path / "runs/ppo/metrics.jsonl")
    assert ["objective/scores" in record for record in records] == [True] * 8


@pytest.mark.slow
def test_what_else_learns_from_what_the_model_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_model(tmp_path / "teacher", hidden_size=96)
    write_rows(tmp_path / "rows.jsonl", 60)
    page = (ROOT / "docs/reinforcement.md").read_text().split("## Pairs")[1]
    lines = re.findall(r"^ {4}(python -m ftjax.+MODEL.+)$", page, re.MULTILINE)
    for line in lines:
        line = line.replace("MODEL", "model").replace("TEACHER", "teacher").replace("configs/", f"{ROOT}/configs/")
        arguments = [word for word in shlex.split(line)[2:] if "adapter.source" not in word]
        small = (*SMALL, "--config.rollouts.max_new_tokens=8") if arguments[0] == "ftjax.train" else ()
        finish(command(*arguments, *small or ("--max_new_tokens=8",)))
    assert len(lines) == 4
    assert len((tmp_path / "best.jsonl").read_text().splitlines()) == 60
    for name, metric in (("online-dpo", "objective/scores_margin"), ("rejection", "reward_best"), ("gkd", "entropy")):
        assert [metric in record for record in metrics.read(tmp_path / f"runs/{name}/metrics.jsonl")] == [True, True]


@pytest.mark.slow
def test_supervised_tuning_then_preferences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 60)
    write_pairs(tmp_path / "pairs.jsonl", 60)
    write_labeled(tmp_path / "labeled.jsonl", 60)
    for arguments in COMMANDS:
        arguments = [word.replace("MODEL", "model").replace("configs/", f"{ROOT}/configs/") for word in arguments]
        small = SMALL if arguments[0] == "ftjax.train" else ()
        if "--config.adapter.source=runs/sft-adapter" in arguments:
            small = [word for word in small if "adapter.rank" not in word]  # the adapter says that itself
        finish(command(*arguments, *small))
    first = metrics.read(tmp_path / "runs/dpo/metrics.jsonl")[0]
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    first = metrics.read(tmp_path / "runs/kto/metrics.jsonl")[0]
    assert (first["loss"], first["kl"]) == (0.5, 0)
