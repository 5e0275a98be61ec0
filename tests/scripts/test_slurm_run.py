"""A real run of two processes through scripts/slurm/train.sbatch: stopped at its time limit, requeued, finished."""

import os
import signal
import stat
import subprocess
import sys

import pytest
from support import ROOT, SUPPORT, xla_flags
from support.runs import at_step, write_run

from ftjax.training import metrics

SCRIPT = ROOT / "scripts/slurm/train.sbatch"


@pytest.mark.slow
def test_a_run_is_requeued_when_its_time_is_over_and_goes_on_to_its_end(tmp_path):
    bin, checkout, workdir = tmp_path / "bin", tmp_path / "checkout", tmp_path / "run"
    commands = {
        bin / "srun": f'exec {sys.executable} -IS {SUPPORT / "fake_srun.py"} "$@"',
        bin / "squeue": "echo RUNNING",
        bin / "scontrol": 'echo "$*" >>"$FAKE/scontrol"',
        checkout / ".venv/bin/python": f'exec {sys.executable} "$@"',
    }
    for path, line in commands.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "FTJAX"))} | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(1),
        "FAKE": str(tmp_path),
        "FAKE_TASKS": "2",
        "FAKE_NODES": "2",
        "FAKE_NODELIST": "localhost,other",
        "SLURM_JOB_ID": str(os.getpid()),  # from which the port follows
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    arguments = [
        f"--config={write_run(tmp_path)}",
        f"--workdir={workdir}",
        "--config.mesh.fsdp=2",
        "--config.data.checks=warn",
    ]

    def start(**variables):
        pipe = subprocess.PIPE
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(command, env=environment | variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    job = start()
    at_step(job, workdir, 5)
    for pid in (tmp_path / "pids").read_text().split():  # as --signal does: to every process of the step
        os.kill(int(pid), signal.SIGTERM)
    told, _ = job.communicate(timeout=400)
    assert job.returncode == 75, told
    assert "saved; requeued" in told
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    stopped = metrics.read(workdir / "metrics.jsonl")[-1]["step"]
    assert 5 <= stopped < 24

    job = start(SLURM_RESTART_COUNT="1")
    told, _ = job.communicate(timeout=400)
    assert job.returncode == 0, told
    assert f"resuming after step {stopped}" in told
    steps = [record["step"] for record in metrics.read(workdir / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, 25))
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
