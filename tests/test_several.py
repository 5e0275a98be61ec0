"""One run as several processes with gloo: it trains, is stopped and goes on, and ends together, whatever happens."""

import json
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from support import ROOT
from support.runs import at_step, command, finish, signal_at_step, write_run
from support.several import HEARTBEAT, ended, finished, started

from ftjax import assemble, tree
from ftjax.training import metrics

# Below what is measured: with 3e-2, which the other runs use, differences in rounding would grow with the steps.
INVARIANT = ("--config.optimizer.learning_rate=2e-4", "--config.steps=20", "--config.mesh.fsdp=-1")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("several")
    write_run(path)
    return path


def together(root, workdir, count, *overrides, each=(), devices=1):
    arguments = [f"--config={root / 'run.py'}", f"--workdir={workdir}", "--config.mesh.fsdp=-1", *overrides]
    return started(count, "ftjax.train", *arguments, each=each, devices=devices)


def alone(root, workdir, *overrides):
    return finish(command("ftjax.train", f"--config={root / 'run.py'}", f"--workdir={workdir}", *overrides))


def losses(workdir):
    return {record["step"]: record["loss"] for record in metrics.read(workdir / "metrics.jsonl") if "loss" in record}


def adapters(workdir):
    _, _, variables, step = assemble.load_run(workdir)
    return step, {path: np.asarray(leaf) for path, leaf in tree.flatten(variables["lora"]).items()}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[path] - theirs[path]).max()) for path in ours)


@pytest.fixture(scope="module")
def one(root):
    """The run of 20 steps as one process."""
    alone(root, root / "one", *INVARIANT)
    return losses(root / "one"), adapters(root / "one")[1]


def assert_same_run(workdir, one, record_figure):
    (step, ours), theirs = adapters(workdir), losses(workdir)
    assert step == 20
    assert theirs.keys() == one[0].keys() == set(range(1, 21))
    loss = max(abs(theirs[step] - value) / abs(value) for step, value in one[0].items())
    record_figure("loss, relative", loss)
    record_figure("adapters", difference := largest_difference(ours, one[1]))
    assert loss < 1e-6
    assert difference < 1e-5


def test_sigterm_on_one_of_two_saves_on_both_and_the_run_goes_on(root, record_figure):
    steps = ("--config.steps=600", "--config.optimizer.learning_rate=2e-4", "--config.eval_every=0")
    workdir = root / "terminated"
    with together(root, workdir, 2, *steps) as processes:
        signal_at_step(processes[1], workdir, 10, signal.SIGTERM)
        sent = time.monotonic()
        printed = finished(processes, 75)
        record_figure("seconds from SIGTERM to the end", time.monotonic() - sent)
    assert "SIGTERM: saved step" in printed[0]
    assert "step" not in printed[1]  # one process speaks
    step, _ = adapters(workdir)
    assert 10 <= step < 600
    assert max(losses(workdir)) == step
    with together(root, workdir, 2, *steps) as processes:
        signal_at_step(processes[0], workdir, step + 10, signal.SIGTERM)
        printed = finished(processes, 75)
    assert f"resuming after step {step}" in printed[0]
    assert list(losses(workdir)) == list(range(1, adapters(workdir)[0] + 1))


def test_two_processes_train_what_one_does(root, one, record_figure):
    with together(root, root / "two", 2, *INVARIANT) as processes:
        finished(processes)
    assert_same_run(root / "two", one, record_figure)
    evals = [
        {name: value for name, value in record.items() if name.startswith("eval_")}
        for workdir in ("one", "two")
        for record in metrics.read(root / workdir / "metrics.jsonl")
        if "eval_loss" in record
    ]
    half = len(evals) // 2
    for ours, theirs in zip(evals[half:], evals[:half], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [(["data=2", "fsdp=-1"], 1), (["tensor=2", "fsdp=-1"], 2)])
def test_four_processes_train_what_one_does(root, one, record_figure, mesh, devices):
    workdir = root / f"four-{mesh[0]}"
    with together(root, workdir, 4, *INVARIANT, *(f"--config.mesh.{axis}" for axis in mesh), devices=devices) as four:
        finished(four)
    assert_same_run(workdir, one, record_figure)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(root, one, record_figure):
    """Two, then four, then one; each killed in the middle but for the last."""
    workdir = root / "changing"
    every = "--config.checkpoint_every=2"
    for count, step in ((2, 7), (4, 13)):
        with together(root, workdir, count, *INVARIANT, every) as processes:
            signal_at_step(processes[0], workdir, step, signal.SIGKILL)
            assert all(ended(processes, HEARTBEAT + 10))
    alone(root, workdir, *INVARIANT, every)
    assert_same_run(workdir, one, record_figure)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_all_end(root, killed, record_figure):
    workdir = root / f"killed-{killed}"
    steps = ("--config.steps=5000", "--config.eval_every=0", "--config.log_every=1")
    with together(root, workdir, 3, *steps, "--config.data.batch_size=6") as processes:
        signal_at_step(processes[killed], workdir, 5, signal.SIGKILL)
        start = time.monotonic()
        statuses = ended(processes, HEARTBEAT + 10)
        record_figure("seconds until all have ended", time.monotonic() - start)
    assert statuses[killed] == -signal.SIGKILL
    assert 0 not in statuses


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_both_and_older_steps_stay(root):
    """Process 1 may suddenly write no more than a byte to any file, as on a full disk of its own."""
    workdir, steps = root / "full", ("--config.steps=5000", "--config.eval_every=0", "--config.checkpoint_every=50")
    with together(root, workdir, 2, *steps) as processes:
        at_step(processes[1], workdir, 60)
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (1, 1))
        printed = finished(processes, 1)
    assert any("saving step" in text for text in printed)
    assert any("File too large" in text for text in printed)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert "50" in names
    whole = sorted(int(name) for name in names if name.isdecimal())
    beyond = max(losses(workdir)) + 20  # what the first run has logged says nothing of the second
    with together(root, workdir, 2, *steps) as processes:
        signal_at_step(processes[1], workdir, beyond, signal.SIGTERM)
        assert f"resuming after step {whole[-1]}" in finished(processes, 75)[0]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_all(root):
    workdir, steps = root / "damaged", ("--config.steps=4", "--config.eval_every=0")
    with together(root, workdir, 2, *steps) as processes:
        finished(processes)
    files = [path for path in (workdir / "checkpoints" / "4" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    shutil.move(workdir / "metrics.jsonl", workdir / "kept")  # else the run is finished, and nothing is restored
    with together(root, workdir, 2, *steps) as processes:
        printed = finished(processes, 2)
    for text in printed:
        assert "damaged files: state/" in text


def test_a_mistake_on_one_host_ends_all_with_its_message(root, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = (root / "train.jsonl").read_text().splitlines()
    rows.write_text("\n".join([*lines[:-1], '{"messages": []}']) + "\n")
    only_one = [[], [f"--config.data.train=('{rows}',)"]]
    start = time.monotonic()
    with together(root, tmp_path / "run", 2, each=only_one) as processes:
        printed = finished(processes, 2)
    assert "rows.jsonl:120" in printed[0]
    assert "ended with process 1" in printed[0]
    assert "rows.jsonl:120" in printed[1]
    assert time.monotonic() - start < 60
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_workdir_that_the_hosts_do_not_share_is_refused(root, tmp_path):
    each = [[f"--workdir={tmp_path / str(index)}"] for index in range(2)]
    with together(root, "nowhere", 2, each=each) as processes:
        printed = finished(processes, 2)
    for text in printed:
        assert f"workdir {tmp_path / '1'}: process 1 does not see there what process 0 writes" in text
    assert not (tmp_path / "0" / "config.json").exists()


@pytest.mark.slow
def test_a_process_that_does_not_come_is_told(root, tmp_path):
    alone_of_two = [["--processes=2", "--process=0", "--start_timeout=5"]]
    with together(root, tmp_path / "run", 1, each=alone_of_two) as processes:
        assert "not all processes met at localhost" in finish(processes[0], 1)


@pytest.mark.slow
def test_a_task_is_scored_by_all_and_written_by_one_and_the_run_is_exported(root, tmp_path):
    scored = ("--config.data.eval=('task:support_ticket',)", "--config.evaluate.max_new_tokens=4", "--config.steps=2")
    scored += ("--config.evaluate.general=general", "--config.evaluate.general_tokens=384")
    with together(root, tmp_path / "two", 2, *scored) as processes:
        finished(processes)
    alone(root, tmp_path / "one", *scored)
    ours, theirs = ((tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("two", "one"))
    assert [json.loads(line)["completion"] for line in ours] == [json.loads(line)["completion"] for line in theirs]
    ours, theirs = (metrics.read(tmp_path / name / "metrics.jsonl")[-1] for name in ("two", "one"))
    general = [name for name in theirs if name.startswith("eval_general/")]
    assert {"eval_general/loss", "eval_general/change", "eval_general/kl", "eval_general/code"} <= {*general}
    assert {name: ours[name] for name in general} == pytest.approx({name: theirs[name] for name in general}, abs=1e-4)
    for form in ("peft", "merged"):
        out = tmp_path / form
        with started(2, "ftjax.export", f"--workdir={tmp_path / 'two'}", f"--format={form}", f"--out={out}") as two:
            printed = finished(two)
        assert "step 2 of" in printed[0]
        assert "step 2 of" not in printed[1]
        assert list(out.glob("*.safetensors"))
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert parity["relative_difference"] < 1e-5


@pytest.mark.slow
def test_all_end_early_alike(root):
    ending = ("--config.eval_every=2", "--config.evaluate.patience=2", "--config.evaluate.min_delta=100.0")
    for said in ("step 4: the run ends early", "This run is finished: 4 steps"):
        with together(root, root / "early", 2, *ending) as processes:
            assert said in finished(processes)[0]
    assert adapters(root / "early")[0] == 4


@pytest.mark.slow
def test_what_two_processes_write_and_learn_from_it_is_what_one_does(root, record_figure):
    """PPO on two devices of one process, and of two: reference and critic are asked by all, a process writes alone."""
    (root / "texts.jsonl").write_text('{"text": "The old lamp is red and the new one is blue."}\n' * 8)
    settings = {
        "objective.name": "ppo", "objective.rewards": ("f1",), "objective.kl_coef": 0.1, "objective.kl_target": 0.5,
        "data.ptx": (str(root / "texts.jsonl"),), "objective.ptx_coef": 0.5, "data.batch_size": 8, "data.eval": (),
        "rollouts.samples": 1, "rollouts.iterations": 2, "rollouts.max_new_tokens": 8, "steps": 6, "log_every": 1,
        "optimizer.learning_rate": 2e-4, "accumulate": 2, "checkpoint_every": 6, "eval_every": 0, "data.row_length": 0,
    }  # fmt: skip
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    with together(root, root / "ppo", 1, *given, devices=2) as processes:
        finished(processes)
    with together(root, root / "ppo-two", 2, *given) as processes:
        finished(processes, 0)
    one, two = (metrics.read(root / name / "metrics.jsonl") for name in ("ppo", "ppo-two"))
    assert len(one) == len(two) == 6
    for name in ("reward", "objective/kl", "objective/kl_coef", "loss", "loss/value_avg", "loss/ptx_avg"):
        ours, theirs = ([record[name] for record in records] for records in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
    assert (root / "ppo" / "rollouts.jsonl").read_text().count("\n") == 3
    difference = largest_difference(adapters(root / "ppo")[1], adapters(root / "ppo-two")[1])
    record_figure("adapters", difference)
    assert difference < 1e-5


@pytest.mark.slow
def test_episodes_of_two_processes_are_those_of_one(root, monkeypatch, record_figure):
    """The first process has the environments, whose own numbers nobody else would draw alike, and tells the others."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests:{ROOT}")
    settings = {
        "objective.name": "grpo", "rollouts.environment": "support.games:OfOneProcess", "rollouts.turns": 3,
        "rollouts.samples": 4, "data.batch_size": 8, "data.eval": (), "rollouts.max_new_tokens": 8, "steps": 4,
        "rollouts.stop_strings": ("e", "a", "i", "o"), "log_every": 1, "optimizer.learning_rate": 2e-4, "accumulate": 2,
        "checkpoint_every": 4, "eval_every": 0, "data.row_length": 0, "data.max_length": 192,
    }  # fmt: skip
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    with together(root, root / "game", 1, *given, devices=2) as processes:
        finished(processes)
    with together(root, root / "game-two", 2, *given) as processes:
        finished(processes, 0)
    one, two = (metrics.read(root / name / "metrics.jsonl") for name in ("game", "game-two"))
    assert one[0]["episodes/turns_mean"] > 1
    for name in ("reward", "loss", "episodes/turns_mean", "episodes/environment_tokens_mean"):
        ours, theirs = ([record[name] for record in records] for records in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)
    difference = largest_difference(adapters(root / "game")[1], adapters(root / "game-two")[1])
    record_figure("adapters", difference)
    assert difference < 1e-5


@pytest.mark.slow
def test_sigterm_on_one_of_two_that_write_gives_up_the_round_on_both(root, record_figure):
    settings = {
        "objective.name": "grpo", "objective.rewards": ("f1",), "data.eval": (), "eval_every": 0, "steps": 20,
        "data.batch_size": 32, "data.max_length": 256, "data.row_length": 0, "rollouts.samples": 2, "accumulate": 2,
        "rollouts.max_new_tokens": 192, "rollouts.batch_size": 2, "checkpoint_every": 100,
    }  # fmt: skip
    workdir, given = root / "gives-up", [f"--config.{key}={value}" for key, value in settings.items()]
    with together(root, workdir, 2, *given) as processes:
        signal_at_step(processes[1], workdir, 1, signal.SIGTERM)  # the second step is on its way, and the third written
        sent = time.monotonic()
        printed = finished(processes, 75)
        record_figure("seconds from SIGTERM to the end", time.monotonic() - sent)
    assert "SIGTERM: saved step 2; " in printed[0]
    assert (workdir / "rollouts.jsonl").read_text().count("\n") == 2  # the third round was not written to its end
