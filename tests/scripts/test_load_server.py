"""scripts/load_server.py on a small random model: streams and jobs that end, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import PYTHONPATH
from support.runs import write_model

SCRIPT = Path(__file__).parents[2] / "scripts/load_server.py"


@pytest.mark.slow
def test_64_streams_and_5_jobs_without_an_error(tmp_path):
    model = write_model(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--seconds", "40", "--tokens", "40", "--jobs", "5"]
    for setting in ("jobs.settings=('adapter.rank=4',)", "generation.max_length=512"):
        command += ["--set", setting]
    made = subprocess.run(command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    result = json.loads(made.stdout)
    assert result["errors"] == {}
    assert result["left"] == 0
    assert result["answers"] > 64
    assert result["left_early"] > 0
    assert sum(result["jobs"].values()) == 5
    assert result["jobs"]["succeeded"] > 0
    assert max(result["mebibytes"]) < 4096
