"""scripts/slurm/train.sbatch with an srun, squeue and scontrol that note their calls and run the tasks here."""

import json
import os
import re
import subprocess
import sys

import pytest
from support import ROOT, SUPPORT

SCRIPT = ROOT / "scripts/slurm/train.sbatch"
NASTY = ["--config.model.source=a b", 'it\'s "$HOME" `id` $(id)', "x;y|z", "", "line\nline", "*"]

TASK = """
import json, os, sys
from pathlib import Path
task = os.environ["SLURM_PROCID"]
(Path(os.environ["FAKE"]) / f"task-{task}").write_text(json.dumps(sys.argv[1:]))
sys.exit(int(os.environ["FAKE_STATUS"].split(",")[int(task)]))
"""

FIND = """
from ftjax import distributed
print("found", distributed.find_cluster(None, None, None, 1), flush=True)
"""


@pytest.fixture
def submit(tmp_path):
    """`submit(*arguments, task=source, status=(75, 75), **variables)` runs the script as SLURM would."""
    bin, fake, checkout = tmp_path / "bin", tmp_path / "fake", tmp_path / "check out"
    (checkout / ".venv/bin").mkdir(parents=True)
    bin.mkdir()
    fake.mkdir()

    def command(path, line):
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)

    command(bin / "srun", f'exec {sys.executable} -IS {SUPPORT / "fake_srun.py"} "$@"')
    command(bin / "squeue", 'printf "%s\\n" "$*" >>"$FAKE/squeue"; echo "$FAKE_STATE"')
    command(bin / "scontrol", 'printf "%s\\n" "$*" >>"$FAKE/scontrol"')

    def run(*arguments, task=TASK, status=(75, 75), state="RUNNING", nodes=2, **variables):
        (fake / "task.py").write_text(task)
        command(checkout / ".venv/bin/python", f'exec {sys.executable} {fake / "task.py"} "$@"')
        spool = tmp_path / "slurm_script"  # SLURM runs a copy, somewhere else
        spool.write_text(SCRIPT.read_text())
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "FTJAX"))} | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FAKE": str(fake),
            "FAKE_TASKS": str(len(status)),
            "FAKE_NODES": str(nodes),
            "FAKE_STATUS": ",".join(map(str, status)),
            "FAKE_STATE": state,
            "SLURM_JOB_ID": "4711",
            "SLURM_SUBMIT_DIR": str(checkout),
            **variables,
        }
        done = subprocess.run(
            ["bash", str(spool), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        calls = fake / "scontrol"
        requeued = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, requeued, done.stdout + done.stderr

    run.fake = fake
    return run


def test_arguments_arrive_at_every_task_as_they_were_given(submit):
    arguments = ["--config", "c.py", "--workdir", "/shared/my run", *NASTY]
    status, requeued, told = submit(*arguments, status=(0, 0))
    assert (status, requeued) == (0, []), told
    for task in (0, 1):
        assert json.loads((submit.fake / f"task-{task}").read_text()) == ["-m", "ftjax.train", *arguments]
    # The first to end must not take along one that still writes.
    assert "--kill-on-bad-exit=0" in json.loads((submit.fake / "srun").read_text())


def test_a_job_of_an_array_is_one_run_of_a_sweep(submit):
    arguments = ["--config", "c.py", "--workdir=/shared/sweep", "--sweep", "adapter.rank=8,16;seed=1,2"]
    status, requeued, told = submit(*arguments, SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID="3")
    assert (status, requeued) == (75, ["requeue 4711_3"]), told  # by its number SLURM may know the whole array
    assert "--jobs=4711_3" in (submit.fake / "squeue").read_text()
    for task in (0, 1):
        wanted = ["-m", "ftjax.sweep", *arguments, "--index=3"]
        assert json.loads((submit.fake / f"task-{task}").read_text()) == wanted


@pytest.mark.parametrize(
    ("status", "state", "ends", "requeues"),
    [
        ((0, 0), "RUNNING", 0, False),
        ((75, 75), "RUNNING", 75, True),
        ((2, 2), "RUNNING", 2, False),
        ((1, 0), "RUNNING", 1, False),
        ((75, 134), "RUNNING", 134, False),
        ((75, 75), "COMPLETING", 75, False),  # scancel
        ((75, 75), "PREEMPTED", 75, False),  # SLURM requeues it
        ((75, 75), "", 75, False),
    ],
)
def test_only_a_saved_run_of_a_job_that_goes_on_is_requeued(submit, status, state, ends, requeues):
    code, requeued, told = submit("--workdir=/shared/x", status=status, state=state)
    assert code == ends, told
    assert requeued == (["requeue 4711"] if requeues else []), told


def test_requeueing_comes_to_an_end(submit):
    code, requeued, told = submit("--workdir=/x", SLURM_RESTART_COUNT="3", FTJAX_MAX_REQUEUES="3")
    assert (code, requeued) == (75, [])
    assert "start 4" in told


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (["--config", "c.py"], {}, "give --workdir"),
        (["--workdir=/x"], {"FTJAX_ROOT": "/"}, "no .venv/bin/python"),
        (["--workdir=/x"], {"SLURM_JOB_ID": ""}, "this is for sbatch"),
        (["--workdir=/x", "--sweep=seed=1,2"], {}, "a sweep is a job array: sbatch --array=0-N"),
        (["--workdir=/x"], {"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, "some of 8 GPUs idle"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(submit, arguments, variables, told):
    code, requeued, text = submit(*arguments, **variables)
    assert (code, requeued) == (2, [])
    assert told in text
    assert not (submit.fake / "srun").exists()


def test_the_processes_find_each_other_by_what_slurm_sets(submit):
    _, _, told = submit("--workdir=/x", task=FIND, status=(0, 0))
    assert "processes=2, process=0, devices=None" in told, told
    assert "processes=2, process=1, devices=None" in told, told
    coordinators = re.findall(r"coordinator='(n1:\d+)'", told)
    assert len(coordinators) == 2
    assert len(set(coordinators)) == 1


def test_what_slurm_is_asked_for():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M))
    assert asked["requeue"] == ""
    assert asked["open-mode"] == "append"  # a requeued job keeps its log
    signal, _, seconds = asked["signal"].partition("@")
    assert signal == "TERM"  # without "B:": to the processes of the run, not to the script
    assert int(seconds) >= 60
