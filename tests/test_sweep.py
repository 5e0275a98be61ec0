"""Sweeps: which runs they are, what becomes of them, and the table at the end."""

import json
import os
import shlex
import signal

import pytest
from support.runs import command, finish, write_run

from ftjax import config as configs
from ftjax import sweep
from ftjax.errors import UserError
from ftjax.evals import best, deciding
from ftjax.sweep import Result, Run


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("adapter.rank=8,16", [{"adapter.rank": "8"}, {"adapter.rank": "16"}]),
        (
            "optimizer.learning_rate=1e-4, 3e-4; adapter.rank=8",
            [
                {"optimizer.learning_rate": "1e-4", "adapter.rank": "8"},
                {"optimizer.learning_rate": "3e-4", "adapter.rank": "8"},
            ],
        ),
        (
            """data.train=('a.jsonl', 'b.jsonl'),c.jsonl;data.system='Be; brief, please',""",
            [
                {"data.train": train, "data.system": system}
                for train in ("('a.jsonl', 'b.jsonl')", "c.jsonl")
                for system in ("'Be; brief, please'", "")
            ],
        ),
    ],
)
def test_a_grid_is_every_combination(text, settings):
    assert sweep.read(text) == settings


@pytest.mark.parametrize("text", ["adapter.rank", "adapter.rank=8;adapter.rank=16"])
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(UserError, match="must be KEY=VALUE,VALUE,"):
        sweep.read(text)


def test_a_file_is_a_grid_or_a_list_of_settings(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("adapter.rank: [8, 16]\ndata.packing: [true]\n")
    assert sweep.read(str(path)) == [{"adapter.rank": rank, "data.packing": "true"} for rank in ("8", "16")]
    path.write_text("- {adapter.rank: 8, optimizer.learning_rate: 1e-4}\n- data.train: [a.jsonl, b.jsonl]\n")
    assert sweep.read(str(path)) == [
        {"adapter.rank": "8", "optimizer.learning_rate": "1e-4"},
        {"data.train": "('a.jsonl', 'b.jsonl')"},
    ]
    path.write_text("adapter.rank: 8\n")
    with pytest.raises(UserError, match=r"settings\.yaml: must be a mapping from keys to lists, or a list of mappings"):
        sweep.read(str(path))
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        sweep.read(str(tmp_path / "nowhere.yaml"))


COMMON = [("model.source", "M"), ("data.train", "rows.jsonl")]


def planned(text, where, common=COMMON):
    return sweep.planned(sweep.read(text), where, "chat", common)


def test_each_run_has_a_name_that_says_what_is_different_and_its_command(tmp_path):
    runs = planned("optimizer.learning_rate=1e-4;adapter.rank=8,16;adapter.targets=q_proj|v_proj", tmp_path)
    names = [f"learning_rate=1e-4,rank={rank},targets=q_proj_v_proj" for rank in (8, 16)]
    assert [run.name for run in runs] == names
    assert runs[1].arguments == [
        "--config=chat",
        "--config.model.source=M",
        "--config.data.train=rows.jsonl",
        "--config.optimizer.learning_rate=1e-4",
        "--config.adapter.rank=16",
        "--config.adapter.targets=q_proj|v_proj",
        f"--workdir={tmp_path / names[1]}",
    ]
    alike = planned("data.seed=1;seed=2", tmp_path)
    assert [run.name for run in alike] == ["data.seed=1,seed=2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter.rnk=8", r"no key 'adapter\.rnk'; did you mean 'adapter\.rank'"),
        ("adapter.rank=8,many", r"adapter\.rank=many: must be a whole number"),
        ("adapter.rank=8,0", r"config\.adapter\.rank=0: it must be"),
        ("adapter.rank=8,8", "rank=8 stands there twice"),
        ("data.train=a.jsonl,b.jsonl", r"--config\.data\.train is for all runs, and --sweep changes it"),
        ("evaluate.temperature=0.5,1.0", "runs that differ in evaluate.temperature are measured differently"),
        ("evaluate.best=eval_loss,eval_x/score", "runs that differ in evaluate.best are measured differently"),
        ("evaluate.patience=1,2", r"config\.evaluate\.patience=1 does nothing"),
        (";", "names no setting"),
    ],
)
def test_a_mistake_in_any_run_is_told_before_the_first(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        planned(text, tmp_path)


def test_runs_whose_losses_are_not_one_measure_are_not_ranked_by_them(tmp_path):
    common, text = [*COMMON, ("data.holdout", "0.1")], "objective.label_smoothing=0.0,0.3"
    with pytest.raises(UserError, match=r"objective\.label_smoothing changes what eval_loss is, which decides"):
        planned(text, tmp_path, common)
    assert len(planned(text, tmp_path, [*common, ("evaluate.best", "eval_cross_entropy")])) == 2


class Process:
    """Stands for a run: ends with a status; `during` is done while it runs."""

    def __init__(self, status, during=lambda: None):
        self.status, self._during, self.signals = status, during, []

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        self._during()
        return self.status


def run_all(*processes):
    runs = [Run(str(number), None, {}, [f"--workdir={number}"]) for number in range(len(processes))]
    waiting = list(processes)
    return sweep.run_all(runs, lambda command, process_group: waiting.pop(0))


def test_a_run_that_fails_does_not_stop_those_after_it():
    assert run_all(Process(0), Process(2), Process(1), Process(0)) == ({"0": 0, "1": 2, "2": 1, "3": 0}, 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_goes_to_the_run_and_the_next_ones_wait(number, status):
    before = signal.getsignal(number)
    stopped = Process(status, lambda: os.kill(os.getpid(), number))
    assert run_all(Process(0), stopped, Process(0)) == ({"0": 0, "1": status}, status)
    assert stopped.signals == [number]
    finishing = Process(0, lambda: os.kill(os.getpid(), number))  # it came in the run's last moment
    assert run_all(finishing, Process(0)) == ({"0": 0}, status)
    assert signal.getsignal(number) is before


def test_the_hours_of_a_run_end_the_sweep_as_well():
    assert run_all(Process(75), Process(0)) == ({"0": 75}, 75)


def test_the_table_has_the_best_first(tmp_path, capsys):
    runs = planned("adapter.rank=2,4,8,16", tmp_path)
    for run in runs[:3]:
        run.workdir.mkdir()
        (run.workdir / "config.json").touch()
    results = [
        Result(runs[0], 0, 8, 0.25, "a"),
        Result(runs[1], 0, 4, 0.75, "b"),
        Result(runs[2], 2),
        Result(runs[3], None),
    ]
    sweep.report(tmp_path, deciding.parse("eval_x[train]/score"), results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == [
        ["rank", "eval_x[train]/score", "step", "run"],
        ["4", "0.75", "4", "rank=4"],
        ["2", "0.25", "8", "rank=2"],
        ["8", "failed", "(2)", "rank=8"],
        ["16", "not", "run", "rank=16"],
    ]
    assert "scores do not compare" in " ".join(lines[5])
    page = f"side by side: python -m ftjax.report {tmp_path}/rank=4 {tmp_path}/rank=2 --out {tmp_path}/comparison.html"
    assert lines[6] == page.split()
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert (record["metric"], record["mode"]) == ("eval_x[train]/score", "max")
    assert [(run["name"], run["value"], run["status"]) for run in record["runs"]] == [
        ("rank=4", 0.75, 0),
        ("rank=2", 0.25, 0),
        ("rank=8", None, 2),
        ("rank=16", None, None),
    ]
    assert (tmp_path / "sweep.md").read_text().splitlines()[2] == "| 4 | 0.75 | 4 |  | rank=4 |"
    sweep.report(tmp_path, deciding.parse("eval_loss"), results)
    assert [run["name"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]][:2] == [
        "rank=2",
        "rank=4",
    ]


def test_the_commands_are_listed_for_others_to_run(tmp_path):
    rows = "--config.data.train=my rows.jsonl"
    arguments = ["--config=chat", "--config.model.source=M", rows, "--sweep=adapter.rank=8,16", f"--workdir={tmp_path}"]
    printed = finish(command("ftjax.sweep", *arguments, "--dry_run")).splitlines()
    assert [shlex.split(line)[-1] for line in printed] == [f"--workdir={tmp_path}/rank={rank}" for rank in (8, 16)]
    assert shlex.split(printed[0])[:6] == [
        "python",
        "-m",
        "ftjax.train",
        "--config=chat",
        "--config.model.source=M",
        rows,
    ]
    assert "there are 2 runs, 0 to 1" in finish(command("ftjax.sweep", *arguments, "--index=2"), 2)
    assert "exclude each other" in finish(command("ftjax.sweep", *arguments, "--index=2", "--report"), 2)


@pytest.mark.slow
def test_a_sweep_is_run_run_again_and_compared(tmp_path):
    write_run(tmp_path)
    where = tmp_path / "sweep"
    arguments = [f"--config={tmp_path / 'run.py'}", f"--workdir={where}", "--config.steps=4", "--config.eval_every=2"]
    grid = "--sweep=optimizer.learning_rate=1e-5,3e-2;data.max_length=96,8"  # nothing to train on in 8 tokens
    one = finish(command("ftjax.sweep", *arguments, grid, "--index=2"))
    assert "learning rate 0.03" in one
    printed = finish(command("ftjax.sweep", *arguments, grid), 1)
    assert "--- run 4 of 4: learning_rate=3e-2,max_length=8" in printed
    assert "--- learning_rate=1e-5,max_length=8 failed with status 2" in printed
    assert "This run is finished: 4 steps" in printed  # of --index
    record = json.loads((where / "sweep.json").read_text())
    assert [run["settings"]["optimizer.learning_rate"] for run in record["runs"]][:2] == ["3e-2", "1e-5"]
    assert [run["status"] for run in record["runs"]] == [0, 0, 2, 2]
    scores = best.scores(configs.read(where / "learning_rate=3e-2,max_length=96/config.json"), _records(where))
    assert record["runs"][0]["value"] == min(score for step, score in scores.items() if step)
    again = finish(command("ftjax.sweep", *arguments, grid, "--report"))
    assert "3e-2" in again
    assert "---" not in again


def _records(where):
    lines = (where / "learning_rate=3e-2,max_length=96/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_that_was_stopped_is_not_told_as_finished(tmp_path, monkeypatch):
    (run,) = planned("adapter.rank=2", tmp_path)
    (run.workdir / "checkpoints").mkdir(parents=True)
    given = {"model.source": "M", "data.train": ("rows.jsonl",)}
    configs.write(configs.changed(configs.defaults(), given), run.workdir / "config.json")
    monkeypatch.setattr(sweep, "complete_steps", lambda path: [400, 435])
    starts = [{"step": 0, "steps": 6000}]
    (run.workdir / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    assert sweep.result(run, None).left == "step 435 of 6000"
    assert sweep._said(sweep.result(run, None)) == "step 435 of 6000"
    starts[0]["steps"] = 435
    (run.workdir / "environment.json").write_text(json.dumps({"version": 1, "starts": starts}))
    assert sweep._said(sweep.result(run, None)) == ""
