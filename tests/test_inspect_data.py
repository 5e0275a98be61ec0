"""The command line: what it prints of a run's data, its figures against pandas, its exit status, its page and JSON."""

import json
import re

import numpy as np
import pandas
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.rollouts import config_for
from support.runs import command, finish, write_model, write_rows, write_run

from ftjax import inspect_data, train
from ftjax.models import onednn

ROWS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """train.jsonl has a copy, a contradiction, an address and a cut row; other.jsonl a row that cannot be read."""
    root = tmp_path_factory.mktemp("inspected")
    write_run(root)
    rows = [chat(f"What is {i} times {i}? {'Say it slowly. ' * (i % 5)}", f"It is {i * i}.") for i in range(ROWS)]
    rows += [
        rows[3],
        chat("What is 4 times 4? " + "Say it slowly. " * 4, "It is 17."),
        chat("Mail jo@mail.de", "Done."),
    ]
    rows += [chat("word " * 200, "yes")]
    write(root / "train.jsonl", rows)
    write(root / "eval.jsonl", [chat(f"Who is number {i}?", f"Nobody {i}.") for i in range(5)])
    write(root / "leak.jsonl", [rows[0]])
    write(root / "other.jsonl", [chat("Why?", ""), chat("Whence?", "From there.")])
    return root


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def inspect(run, *arguments, status=0):
    return finish(command("ftjax.inspect_data", "--config", str(run / "run.py"), *arguments), status)


def test_figures_rows_and_verdict_of_data_that_can_be_trained_on(run, tmp_path):
    printed = inspect(
        run, "--rows=2", "--tokens_per_second=50", "--max_rows=0",
        f"--html={tmp_path}/page.html", f"--json={tmp_path}/report.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    frame = pandas.read_json(run / "train.jsonl", lines=True)
    texts = frame.messages.map(lambda turns: json.dumps(turns))
    tokenizer = make_tokenizer(CHATML)
    whole = np.array([len(tokenizer.apply_chat_template(turns)["input_ids"]) for turns in frame.messages])
    kept = np.minimum(whole, 96)[:-1]  # the last has no answer left
    assert report["rows"] == report["looked_at"] == len(frame)
    assert report["copies"] == texts.duplicated().sum() == 1
    assert report["tokens"] == kept.sum()
    assert report["truncated"] == (whole > 96).sum()
    assert (report["dropped"], report["used"]) == (1, len(frame) - 1)
    assert report["epoch"]["tokens"] == report["tokens"] * len(frame) // len(frame)
    assert report["epoch"]["rows"] >= kept.sum() / 96
    assert report["epoch"]["steps"] == 24
    codes = {finding["code"] for finding in report["findings"]}
    assert {"duplicate", "contradiction", "private_email", "untrained"} <= codes
    assert all(finding["severity"] == "warning" for finding in report["findings"])
    assert f"{run}/train.jsonl:{ROWS + 1} (as {run}/train.jsonl:4)" in printed
    assert f"{run}/train.jsonl:{ROWS + 2} (as {run}/train.jsonl:5)" in printed
    assert "[[It| is| |0|.|<|im_end|>(EOS)]]" in re.sub(r"\|?(?<!<)\|(?!im)", "|", printed) or "[[I" in printed
    seconds = round(report["epoch"]["tokens"] / 50)
    assert f"0:{seconds // 60:02d}:{seconds % 60:02d} an epoch" in printed
    assert "no errors" in printed
    page = (tmp_path / "page.html").read_text()
    assert f"{run}/train.jsonl:1" in page
    assert "private_email" in page


def test_errors_end_with_status_2_and_their_places(run):
    files = f"('{run}/train.jsonl','{run}/other.jsonl')"
    printed = inspect(
        run, f"--config.data.train={files}", f"--config.data.eval={run}/leak.jsonl", "--rows=1", "--source=1", status=2
    )
    assert f"error: {run}/other.jsonl:1: message 1 is an empty assistant turn" in printed
    assert f"error: {run}/leak.jsonl:1 (as {run}/train.jsonl:1): rows of the evaluation are also trained on" in printed
    assert "2 errors" in printed


def test_rows_of_the_evaluation_and_of_other_objectives_are_told_as_training_takes_them(run, tmp_path):
    muted = {"messages": [*chat("Whose?", "")["messages"][:1], {"role": "assistant", "content": "Hers.", "weight": 0}]}
    write(tmp_path / "eval.jsonl", [chat("How far?", "Two miles."), muted, chat("long " * 200, "yes")])
    printed = inspect(run, f"--config.data.eval={tmp_path}/eval.jsonl", "--rows=0")
    assert "warning: 2 rows: an evaluation row has no trained token" in printed
    assert f"{tmp_path}/eval.jsonl:2, {tmp_path}/eval.jsonl:3" in printed
    write(tmp_path / "none.jsonl", [muted])
    write(tmp_path / "pairs.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    files = f"('{run}/train.jsonl','{tmp_path}/pairs.jsonl')"
    evaluated = f"--config.data.eval={tmp_path}/none.jsonl"
    printed = inspect(run, f"--config.data.train={files}", evaluated, "--rows=0", status=2)
    assert "[eval_empty]" in printed
    assert "is a preference pair, which this objective does not train on" in printed


def test_a_part_of_the_rows_is_looked_at_and_scaled_up(run, tmp_path):
    printed = inspect(run, "--max_rows=32", "--rows=0", f"--json={tmp_path}/part.json")
    report = json.loads((tmp_path / "part.json").read_text())
    assert "Looked at 32 of 64 rows" in printed
    assert report["looked_at"] == 32
    assert report["epoch"]["tokens"] == pytest.approx(report["tokens"] * 2, rel=0.01)


def test_the_speed_of_a_run_is_its_median_and_a_directory_without_one_is_refused(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    lines = [{"step": i, "tokens_per_second": speed} for i, speed in enumerate((10, 400, 500, 600, 9000))]
    write(workdir / "metrics.jsonl", lines)
    assert "500 tokens/s (the median of 5 steps" in inspect(run, f"--workdir={workdir}", "--rows=0")
    printed = inspect(run, f"--workdir={tmp_path}", "--rows=0", status=2)
    assert "no tokens_per_second there" in printed


def test_help_teaches_and_mistakes_are_told(run):
    process = command("ftjax.inspect_data", "--help")
    printed = "".join(process.communicate(timeout=120))
    for word in ("--rows", "--html", "--source", "file:line", "Exit status"):
        assert word in printed
    assert "has the sources 0 to 0" in inspect(run, "--source=3", status=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


def test_rows_without_an_answer_are_prompts_and_inspected_as_such(prompts, tmp_path, capsys):
    rows = [{"prompt": f"The {color} lamp"} for color in ("blue", "red", "green")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(prompts, **{"data.train": (str(tmp_path / "prompts.jsonl"),), "data.checks": "on"})
    options = dict.fromkeys(("tokens_per_second", "workdir", "source", "html", "json")) | {"max_rows": 100, "rows": 1}
    assert inspect_data.inspect(config, options) == 0
    shown = capsys.readouterr().out
    assert "no errors and no warnings" in shown
    config.steps = 1
    assert train.train(config, tmp_path / "run") == 0


def test_data_are_inspected_on_a_machine_that_could_not_multiply_as_the_run_will(run, monkeypatch):
    monkeypatch.setattr(onednn, "lacks", lambda: "there is none")
    config = config_for(run, **{"data.train": (str(run / "eval.jsonl"),), "model.matmul": "onednn"})
    options = dict.fromkeys(("tokens_per_second", "workdir", "source", "html", "json")) | {"max_rows": 100, "rows": 0}
    assert inspect_data.inspect(config, options) == 0


def test_the_rows_of_the_pretraining_mix_are_inspected_too(prompts, tmp_path, capsys):
    rows = [{"text": f"the {color} lamp hangs here"} for color in ("blue", "red", "green")]
    rows += [{"prompt": "Which lamp?", "completion": "the blue one"}, {"prompt": "Whose?", "completion": ""}]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"objective.name": "ppo", "objective.ptx_coef": 0.5, "data.ptx": (str(tmp_path / "mix.jsonl"),)}
    config = config_for(prompts, **changes, **{"data.checks": "on", "data.ptx_rows": 2, "steps": 6})
    options = dict.fromkeys(("tokens_per_second", "workdir", "source", "html")) | {"max_rows": 100, "rows": 1}
    options |= {"json": str(tmp_path / "report.json"), "html": str(tmp_path / "page.html")}
    assert inspect_data.inspect(config, options) == 2
    shown, ptx = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())["ptx"]
    first, second = shown.split("config.data.ptx, of which each step has 2 rows beside the completions")
    assert f"{prompts}/rows.jsonl:1: " in first
    assert f"{tmp_path}/mix.jsonl:1: " in second
    assert re.search(r"t\[\[he blue lamp hangs here.*\]\]", second.replace("|", ""))
    assert f"error: {tmp_path}/mix.jsonl:5" in second
    assert "1 error" in second
    assert "page.html, with the rows of config.data.train" in " ".join(second.split())
    assert (ptx["rows"], ptx["used"], ptx["epoch"]["steps"]) == (5, 4, 6)
    assert [finding["severity"] for finding in ptx["findings"]].count("error") == 1
