"""Training looks at its rows first: it stops on errors with status 2, says warnings, and does what data.checks says."""

import json

import pytest
from support.runs import command, finish, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("checked")
    write_run(root)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    rows[7]["messages"][0]["content"] += " write to jo.doe@mail.de"
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def train(run, workdir, *changes, status=0):
    arguments = (
        "--config",
        str(run / "run.py"),
        "--workdir",
        str(workdir),
        "--config.steps=1",
        "--config.evaluate.before=False",
        *changes,
    )
    return finish(command("ftjax.train", *arguments), status)


def test_errors_stop_training_before_the_first_step_and_name_their_places(run, tmp_path):
    printed = train(run, tmp_path / "run", "--config.data.checks=on", status=2)
    assert "rows of the evaluation are also trained on" in printed
    assert f"{run}/eval.jsonl:1 (as {run}/train.jsonl:" in printed
    assert "config.data.checks=warn" in printed
    assert f"{run}/train.jsonl:8 (jo*** 14 characters)" in printed
    assert "jo.doe" not in printed
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_warn_prints_them_and_trains(run, tmp_path):
    printed = train(run, tmp_path / "run", "--config.data.checks=warn")
    assert "error: 20 rows: rows of the evaluation are also trained on" in printed
    assert "[private_email]" in printed
    assert (tmp_path / "run/metrics.jsonl").exists()


def test_warnings_alone_do_not_stop_training_and_held_out_rows_are_no_leak(run, tmp_path):
    changes = ("--config.data.checks=on", "--config.data.eval=()", "--config.data.holdout=0.3")
    printed = train(run, tmp_path / "run", *changes)
    assert "[duplicate]" in printed
    assert "[leak" not in printed
