"""The page on learning from rewards: its game and its calculator are played by a small model."""

import json
import re
import shlex

import pytest
from support import ROOT
from support.chat_templates import HERMES
from support.runs import command, finish, write_model

from ftjax import config as configs
from ftjax.training import metrics

PAGE = (ROOT / "docs/reinforcement.md").read_text()
PART = PAGE.split("## Several turns")[1].split("\n## ")[0]
CODE = dict(re.findall(r"```python (\w+)\n(.*?)```", PART, re.DOTALL))
COMMANDS = {
    re.search("workdir runs/(.+)", line)[1]: shlex.split(line.replace("configs/", f"{ROOT}/configs/"))[2:]
    for line in re.findall(r"^ {4}(python -m ftjax.+)$", PART, re.MULTILINE)
}
SMALL = ("--config.data.batch_size=8", "--config.rollouts.samples=4", "--config.rollouts.max_new_tokens=6")
SMALL += ("--config.steps=2", "--config.mesh.fsdp=1", "--config.data.checks=off", "--config.adapter.rank=4")
SMALL += ("--config.model.dtype=float32", "--config.log_every=1", "--config.rollouts.stop_strings=('e','a','1')")


def test_the_settings_are_those_of_the_code():
    rows = re.findall(r"^\| `rollouts\.(\w+)` \| `?([^`|]+?)`? \|", PART, re.MULTILINE)
    assert {name: str(eval(default)) for name, default in rows} == {
        name: str(configs.KEYS[f"rollouts.{name}"].default) for name in ("environment", "tools", "turns")
    }


@pytest.mark.parametrize(("run", "module"), [("guess", "game"), ("calculator", "calculator")])
def test_the_examples_run(tmp_path, monkeypatch, run, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_model(tmp_path / "model", max_position_embeddings=2048)
    (tmp_path / "model/chat_template.jinja").write_text(HERMES)
    (tmp_path / f"{module}.py").write_text(CODE[module])
    (prompt,) = re.findall(r'^With `(\{"prompt": .*\})`', PART, re.MULTILINE)
    (tmp_path / "guess.jsonl").write_text(f"{prompt}\n" * 4)
    row = {"prompt": "What is 12 times 12?", "completion": "144"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    arguments = [word.replace("MODEL", "model") for word in COMMANDS[run]]
    said = finish(command(*arguments, *SMALL, talks=True))  # which no fork does, so that it finds modules here
    assert "turns of so many, answered by" in said
    records = metrics.read(tmp_path / f"runs/{run}/metrics.jsonl")
    assert [record["episodes/turns_mean"] >= 1 for record in records] == [True, True]
    (one, *_) = (tmp_path / f"runs/{run}/rollouts.jsonl").read_text().splitlines()
    assert json.loads(one)["completions"][0]["turns"][0]["role"] == "assistant"
    if run == "guess":
        assert json.loads(one)["completions"][0]["rewards"].keys() == {"environment"}


def test_the_game_is_a_game(monkeypatch):
    space = {}
    exec(CODE["game"], space)
    game = space["Guess"]()
    assert game.reset({}, 5) is None
    said = [game.step(str(number)) for number in range(1, game.number + 1)]
    assert [turn.messages[0]["content"] for turn in said[:-1]] == ["higher"] * (game.number - 1)
    assert (said[-1].done, said[-1].reward) == (True, 1.0)
    assert game.step("nine").reward == -1
