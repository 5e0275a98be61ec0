"""Whole runs of the command line: killed, resumed, finished, and refused."""

import json
import logging
import os
import runpy
import shutil
import signal
import time

import numpy as np
import pytest
from support.reports import write_workdir
from support.runs import command, finish, signal_at_step, write_model, write_rows, write_run

from ftjax import assemble, cli, tree
from ftjax import train as train_module
from ftjax.cli import UNNEEDED
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator
from ftjax.train import _report
from ftjax.train import train as run_config
from ftjax.training import environment, metrics
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.display import Display

TIMES = {"step_time", "tokens_per_second", "data_wait"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path)
    return path


@pytest.fixture(scope="module")
def uninterrupted(root):
    """The workdir of a run that was left alone, and what it printed."""
    workdir = root / "uninterrupted"
    return workdir, finish(train(root, workdir))


def train(root, workdir, *overrides, devices=1):
    arguments = [f"--config={root / 'run.py'}", f"--workdir={workdir}", *overrides]
    return command("ftjax.train", *arguments, devices=devices)


def adapters(workdir):
    _, _, variables, step = assemble.load_run(workdir)
    return step, {path: np.asarray(leaf) for path, leaf in tree.flatten(variables["lora"]).items()}


def records(workdir):
    """The metrics without those that are times."""
    read = metrics.read(workdir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read]


def assert_same_run(workdir, other):
    (step, ours), (other_step, theirs) = adapters(workdir), adapters(other)
    assert step == other_step == 24
    assert ours.keys() == theirs.keys()
    assert any(leaf.any() for path, leaf in ours.items() if path.endswith("lora_b"))
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert records(workdir) == records(other)


@pytest.mark.parametrize("packing", [True, False])
def test_the_step_that_is_compiled_while_the_weights_are_read_is_the_one_that_trains(root, tmp_path, caplog, packing):
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.steps, config.checkpoint_every, config.data.packing = 1, 1, packing
    with caplog.at_level(logging.DEBUG, logger="jax._src.dispatch"):
        assert run_config(config, tmp_path / "run") == 0
    done = [record for record in caplog.records if "Finished XLA compilation of jit(step)" in record.message]
    assert [record.threadName for record in done] == [UNNEEDED if packing else "MainThread"]


def test_memory_goes_back_to_the_system_once_before_the_first_step(root, tmp_path, monkeypatch):
    """Reading the weights and compiling leave more than a tenth of what a step of a small model peaks at."""
    config, happened = runpy.run_path(str(root / "run.py"))["get_config"](), []
    config.steps, config.checkpoint_every, config.eval_every = 2, 2, 0
    monkeypatch.setattr(cli, "give_back_memory", lambda: happened.append("memory"))
    placed = train_module.place_batch
    monkeypatch.setattr(train_module, "place_batch", lambda *given: happened.append("step") or placed(*given))
    assert run_config(config, tmp_path / "run") == 0
    assert happened == ["memory", "step", "step"]


def test_it_learns_and_says_what_it_does(uninterrupted):
    workdir, printed = uninterrupted
    assert [record["step"] for record in records(workdir) if "loss" in record] == list(range(1, 25))
    evals = [(record["step"], record["eval_loss"]) for record in records(workdir) if "eval_loss" in record]
    assert [step for step, _ in evals] == [0, 8, 16, 24]
    assert evals[-1][1] < evals[0][1] / 2
    for word in ("parameters", "LoRA, rank 4", "packed", "1 x cpu", "step 24/24", "checkpoints", "eval_loss"):
        assert word in printed
    for name in ("config.json", "metrics.jsonl", "checkpoints", "tensorboard"):
        assert (workdir / name).exists(), name
    assert "report  " in printed
    assert "Training helped: eval_loss " in (workdir / "report.html").read_text()
    expected = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "mean_token_accuracy", "entropy"}
    assert expected | {"packing_efficiency", "step"} <= records(workdir)[-2].keys()


def test_a_finished_run_is_left_as_it_is(root, uninterrupted, capsys):
    workdir, _ = uninterrupted
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train_here(root, workdir, {}) == 0
    assert "finished" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 17])
def test_killed_and_resumed_it_ends_with_the_same_bits(root, uninterrupted, step):
    workdir = root / f"killed-at-{step}"
    process = train(root, workdir)
    signal_at_step(process, workdir, step, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finish(train(root, workdir))
    assert_same_run(workdir, uninterrupted[0])


def test_sigterm_saves_and_ends_with_75(root, uninterrupted, capsys):
    workdir = root / "terminated"
    process = train(root, workdir)
    signal_at_step(process, workdir, 10, signal.SIGTERM)
    assert "saved step" in finish(process, 75)
    assert int(adapters(workdir)[0]) >= 10
    assert train_here(root, workdir, {}) == 0
    assert "resuming after step" in capsys.readouterr().out
    assert_same_run(workdir, uninterrupted[0])
    first, second = environment.read(workdir)
    assert (first["step"], first["steps"], first["data"]["heldout_examples"]) == (0, 24, 20)
    assert second["step"] >= 10
    assert first["began"] < first["ended"] <= second["began"] < second["ended"]


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    workdir = write_workdir(tmp_path / "run", steps=2)
    assert _report(workdir, Display(1)) == {"report": str(workdir / "report.html")}
    (workdir / "evaluation.json").write_text("{")
    assert _report(workdir, Display(1)) == {}
    assert "report.html is not written: " in capsys.readouterr().out


def test_ctrl_c_in_an_evaluation_saves_and_the_evaluation_is_repeated(root, uninterrupted, monkeypatch, capsys):
    workdir = root / "preempted"
    measure = Evaluator.__call__

    def interrupted(self, step, *variables):
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return measure(self, step, *variables)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        assert train_here(root, workdir, {}) == 130
    assert "Ctrl-C: saved step 8; the same command goes on from there" in capsys.readouterr().out
    assert train_here(root, workdir, {}) == 0
    assert_same_run(workdir, uninterrupted[0])


def test_records_without_a_checkpoint_are_another_runs(root):
    workdir = root / "stale"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n')
    assert train_here(root, workdir, {"steps": 2}) == 0
    assert [record["step"] for record in records(workdir)] == [0, 1, 2, 2]
    assert records(workdir)[0]["eval_loss"] != 1.0


def test_it_goes_back_to_an_older_step_when_asked(root, uninterrupted):
    workdir = root / "rewound"
    shutil.copytree(uninterrupted[0], workdir)
    assert train_here(root, workdir, {"checkpoint.resume_step": 20}) == 0
    assert_same_run(workdir, uninterrupted[0])
    with pytest.raises(UserError, match="no step 3"):
        train_here(root, workdir, {"checkpoint.resume_step": 3})


def test_a_finished_run_is_extended_and_says_what_that_means(root, uninterrupted, capsys):
    workdir = root / "extended"
    shutil.copytree(uninterrupted[0], workdir)
    assert train_here(root, workdir, {"steps": 26}) == 0
    printed = capsys.readouterr().out
    # 0.03 (1 + cos(22/23 pi)) / 2, and (1 + cos(23/25 pi)) for the longer run: one step of each is warm-up.
    assert "this run of 24 steps goes on after step 24 to 26. Its learning rate was" in printed
    assert "0.00014 in the last, and is that of 26 from here, 0.00047 in the next" in printed
    assert adapters(workdir)[0] == json.loads((workdir / "config.json").read_text())["steps"] == 26
    assert [record["step"] for record in records(workdir) if "loss" in record] == list(range(1, 27))
    with pytest.raises(UserError, match=r"has done 26 steps, and .* now ask for 24"):
        train_here(root, workdir, {})


@pytest.mark.slow
def test_extended_with_a_constant_learning_rate_a_run_is_what_a_longer_one_is(root, capsys):
    constant = {"schedule.name": "constant", "schedule.warmup_ratio": 0.0, "data.eval": ()}
    for name, steps in (("longer", 9), ("short", 4), ("short", 9)):
        assert train_here(root, root / name, constant | {"steps": steps}) == 0
    assert "goes on after step 4 to 9, as one of 9 steps from the start" in capsys.readouterr().out
    (_, ours), (_, theirs) = adapters(root / "short"), adapters(root / "longer")
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert records(root / "short") == records(root / "longer")


@pytest.mark.slow
def test_at_the_end_of_its_hours_a_run_saves_and_goes_on(root, uninterrupted, capsys):
    workdir = root / "hours"
    with pytest.raises(UserError, match=r"config\.max_hours=0\.001: the time is over before a step was trained"):
        train_here(root, workdir, {"max_hours": 0.001})
    shutil.rmtree(workdir)

    def needed(self, nbytes):
        return 3600.0 if (workdir / "checkpoints" / "12").exists() else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save_seconds", needed)
        assert train_here(root, workdir, {"max_hours": 1.0}) == 75
    assert "config.max_hours=1: saved step 1" in capsys.readouterr().out
    assert train_here(root, workdir, {}) == 0
    assert_same_run(workdir, uninterrupted[0])


def test_resumed_on_another_mesh_it_sees_the_same_batches(root, uninterrupted):
    workdir = root / "other-mesh"
    process = train(root, workdir)
    signal_at_step(process, workdir, 10, signal.SIGKILL)
    process.communicate()
    finish(train(root, workdir, "--config.mesh.fsdp=4", devices=4))
    ours, theirs = records(workdir), records(uninterrupted[0])
    assert [record.get("num_tokens") for record in ours] == [record.get("num_tokens") for record in theirs]
    # float32 sums in another order, which every step since amplifies: the first ones say whether batches are the same.
    losses = [[record["loss"] for record in run if "loss" in record][:15] for run in (ours, theirs)]
    assert len(losses[0]) == 15
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_full_fine_tuning_of_chosen_parameters(root, capsys):
    workdir = root / "full"
    chosen = {"adapter.trainable": "layers/mlp|^norm/", "adapter.kind": "none", "adapter.rank": 16, "steps": 4}
    assert train_here(root, workdir, chosen) == 0
    assert "none; trained are parameters matching" in capsys.readouterr().out
    config, base, variables, _ = assemble.load_run(workdir)
    start = assemble.load_variables(config, base, {"params": _abstract(base)})
    changed = {
        path
        for path, leaf in tree.flatten(variables["params"]).items()
        if not np.array_equal(leaf, tree.flatten(start["params"])[path])
    }
    kernels = {f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert changed == kernels | {"norm/scale"}


def _abstract(base):
    from support.tiny import one_device

    from ftjax.models.params import abstract_params

    return abstract_params(base.model, one_device())


def test_a_changed_config_or_data_is_refused_on_resume(root, uninterrupted):
    workdir = root / "changed"
    shutil.copytree(uninterrupted[0], workdir)
    with pytest.raises(UserError, match=r"(?s)adapter\.rank: 4 -> 8.*seed: 0 -> 3"):
        train_here(root, workdir, {"adapter.rank": 8, "seed": 3})
    lines = (root / "train.jsonl").read_text().splitlines()
    (root / "train.jsonl").write_text("\n".join(lines[:-1] + lines[:1]) + "\n")
    for path in sorted((workdir / "checkpoints").iterdir())[-1:]:  # not finished any more
        shutil.rmtree(path)
    assert "not what this run began with" in finish(train(root, workdir), 2)
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")


def assert_refused(printed, words):
    """One message, no traceback."""
    assert sum(line.startswith("error:") for line in printed.splitlines()) == 1, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed, printed


AT_THE_COMMAND_LINE = {
    "a misspelt key": (["--config.adapter.rnk=8"], ["rnk", "rank"]),
    "a wrong type": (["--config.adapter.rank=many"], ["adapter.rank", "many"]),
    "a misspelt flag": (["--wrkdir=x"], ["wrkdir", "workdir"]),
    "a NaN learning rate": (["--config.optimizer.learning_rate=nan"], ["learning_rate", "finite"]),
}


@pytest.mark.parametrize(
    "name",
    ["a misspelt key", "a misspelt flag"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("a wrong type", "a NaN learning rate")],
)
def test_a_mistake_ends_with_status_2_and_one_message(root, tmp_path, name):
    overrides, words = AT_THE_COMMAND_LINE[name]
    assert_refused(finish(train(root, tmp_path / "run", *overrides), 2), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [None, "def get_config(: pass"]
    + [pytest.param(text, marks=pytest.mark.slow) for text in ("import nothing_like_it", "x")],
)
def test_a_config_file_that_does_not_load_is_told_in_one_message(tmp_path, text):
    if text is not None:
        (tmp_path / "odd.py").write_text(text)
    printed = finish(command("ftjax.train", f"--config={tmp_path / 'odd.py'}", "--config.seed=1"), 2)
    assert_refused(printed, ["config"])


BAD = {
    "a choice that is none": ({"adapter.kind": "qlora"}, "adapter.kind.*lora, dora, none"),
    "a target that matches nothing": ({"adapter.targets": "qkv_proj"}, "qkv_proj.*q_proj"),
    "a pattern that matches nothing": (
        {"adapter.kind": "none", "adapter.rank": 16, "adapter.trainable": "mpl"},
        "trainable.*'mpl'.*mlp",
    ),
    "a setting that does nothing": (
        {"adapter.kind": "none"},
        "adapter.rank=4 does nothing with.*set --config.adapter.rank=16",
    ),
    "a warm-up of all steps": ({"schedule.warmup_steps": 24}, "24 steps, of which 24 warm up, and none is left"),
    "a rank larger than a layer": ({"adapter.rank": 33, "adapter.init": "pissa"}, "rank=33.*1 to"),
    "rows longer than the model's positions": ({"data.max_length": 513}, "max_length=513.*512 positions"),
    "answers longer than the model's positions": (
        {"data.eval": ("task:support_ticket",), "evaluate.max_new_tokens": 500},
        "max_new_tokens=500.*512 positions",
    ),
    "a batch that does not divide": ({"accumulate": 3}, "batch_size=4.*accumulate=3"),
    "a mesh that does not fit": ({"mesh.fsdp": 2}, "fsdp=2 does not fit 1 cpu device"),
    "a file that is not there": ({"data.train": ("nowhere.jsonl",)}, "nowhere.jsonl"),
    "a task that is not there": ({"data.train": ("task:suport_ticket",)}, "did you mean 'support_ticket'"),
    "an unknown option of a source": ({"data.train": ({"source": "a", "splt": "b"},)}, "'splt'.*did you mean 'split'"),
    "a model that is not there": ({"model.source": "/nowhere/model"}, "/nowhere/model"),
    "a pickle": ({"model.source": "model.bin"}, "model.bin.*safetensors"),
    "nothing to train on": ({"data.max_length": 8}, "no trained token.*max_length"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_refused_before_anything_is_written(root, tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        train_here(root, tmp_path / "run", changes)
    assert not (tmp_path / "run" / "config.json").exists()


def train_here(root, workdir, changes):
    """The same as `train`, in this process."""
    config = runpy.run_path(str(root / "run.py"))["get_config"]()
    config.update_from_flattened_dict(changes)
    return run_config(config, workdir)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [{"role": "user", "content": "hi"}', "rows.jsonl:4"),
        ('{"prompt": "hi", "completion": ""}', "rows.jsonl:4.*empty"),
        ('{"messages": [{"role": "human", "content": "hi"}]}', "rows.jsonl:4.*human"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(root, tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(UserError, match=message):
        train_here(root, tmp_path / "run", {"data.train": (str(path),)})


def test_a_row_with_a_token_beyond_the_embedding_is_refused(root, tmp_path, caplog):
    model = write_model(tmp_path / "model", vocab_size=300)
    with pytest.raises(UserError, match=r"train.jsonl:1: token \d+ .* is beyond the 300 rows.*resize_vocab"):
        train_here(root, tmp_path / "run", {"model.source": str(model)})
    assert "beyond the 300 rows of the model's embedding" in caplog.text


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(root, tmp_path):
    changes = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "checkpoint_every": 1}
    with pytest.raises(UserError, match=r"step \d+: (loss|grad_norm) is (nan|inf).*lower"):
        train_here(root, tmp_path / "run", changes)
    step, leaves = adapters(tmp_path / "run")
    assert step < 24
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


@pytest.mark.slow  # the lock itself: training/test_workdir.py
def test_a_second_run_in_the_same_workdir_is_refused(root):
    workdir = root / "shared"
    first = train(root, workdir)
    signal_at_step(first, workdir, 1, signal.SIGSTOP)
    try:
        assert_refused(finish(train(root, workdir), 2), [f"pid {first.pid}"])
    finally:
        first.kill()
        first.communicate()
