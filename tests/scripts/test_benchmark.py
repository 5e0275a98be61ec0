"""scripts/benchmark.py: its table, and tiny that all contestants run."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT
from support.runs import write_model


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark

    return benchmark


def test_ratios_are_of_runs_after_each_other_and_with_the_fastest_of_ours(benchmark):
    rates = {
        ("ftjax", "float32"): [100, 200, 300],
        ("ftjax", "bfloat16"): [50, 60, 70],
        ("peft", "float32"): [50, 50, 50],
    }
    records = [
        {"case": "lora", "who": who, "dtype": dtype, "rate": rate, "peak": 2e9, "first": 7.0 if who == "peft" else None}
        for (who, dtype), values in rates.items()
        for rate in values
    ]
    records += [{"case": "start", "how": how, "seconds": seconds} for how, seconds in (("cold", 20.0), ("warm", 9.0))]
    records.append({"case": "quickstart", "seconds": 330.0, "score": 0.905})
    lines = benchmark.table(records).splitlines()[2:]
    assert lines[0] == "| LoRA, 4 x 256 | ftjax, float32 | 200 |  | 2.00 GB |  |"
    assert lines[2] == "| LoRA, 4 x 256 | transformers + PEFT, float32 | 50 | 4.00 (2.00 to 6.00) | 2.00 GB | 7 s |"
    assert lines[3].endswith("| 20 s |")
    assert benchmark.spread([1.5]) == "1.50"
    assert lines[4].endswith("| 9 s |")
    assert lines[5] == "| the quickstart, training and scoring (90.5%) | ftjax | | | | 5.5 min in all |"


@pytest.mark.slow
def test_all_contestants_are_timed_on_as_many_tokens(tmp_path):
    write_model(tmp_path / "model")
    words = [
        "--model",
        str(tmp_path / "model"),
        "--case",
        "full",
        "--dtype",
        "float32",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *words, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = {run["who"]: run for run in json.loads(done.stdout)["runs"]}
    assert set(found) == {"ftjax", "peft", "trl"}
    for run in found.values():
        assert run["tokens"] == [4 * 256]
        assert run["rate"] > 0
        assert run["peak"] > 1e8
