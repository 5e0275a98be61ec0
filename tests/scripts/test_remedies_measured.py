"""scripts/remedies.py: the table and the plot of its results; what it measures takes long and is slow."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from support import ROOT

SCRIPT = ROOT / "scripts/remedies.py"
RECORDS = [
    {"name": "base", "score": 0.0, "change": 0.0, "loss": 2.0, "general": 2.9},
    {"name": "LoRA, rank 16, interpolated 0.5", "score": 0.5, "change": 0.1, "loss": 0.3}
    | {"of": "LoRA, rank 16", "share": 0.5},
    {"name": "LoRA, rank 16", "score": 0.8, "change": 0.4, "loss": 0.05, "steps": 40, "seconds": 9},
    {"name": "LoRA, L2-SP", "score": 0.6, "change": 0.05, "loss": 0.09, "steps": 120, "seconds": 9},
]


def run(directory, *words):
    command = [sys.executable, str(SCRIPT), f"--out={directory}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finished_results_are_drawn_and_not_measured_again(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in reversed(RECORDS)))
    said = run(tmp_path, "--only=LoRA, rank 16", "--only=LoRA, L2-SP")
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == [
        "| base",
        "| LoRA, rank 16",
        "| LoRA, rank 16, interpolated 0.5",
        "| LoRA, L2-SP",
    ]
    assert rows[0][1:4] == ["0%", "2.900", "2.000"]
    assert rows[3][1:4] == ["60%", "+0.050", "0.090 (not reached)"]
    drawn = ElementTree.parse(tmp_path / "remedies.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    line = drawn.find(f"{svg}polyline").attrib["points"].split()
    assert len(line) == 3  # from the base by the interpolation to what was trained
    across, up = zip(*(map(float, point.split(",")) for point in line))
    assert list(across) == sorted(across)
    assert list(up) == sorted(up, reverse=True)


@pytest.mark.slow
def test_a_variant_is_trained_and_measured_with_its_interpolations(tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "The sea is wide and the hills are old."}\n' * 2)
    run(tmp_path, f"--general={general}", "--tickets=2", "--most=4", "--only=LoRA, rank 16")
    found = {
        record["name"]: record for record in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    }
    assert len(found) == 6
    assert found["base"]["change"] == pytest.approx(0, abs=1e-5)
    changes = [found[f"LoRA, rank 16{part}"]["change"] for part in (", interpolated 0.3", ", interpolated 0.9", "")]
    assert changes[0] != changes[1] != changes[2]
    assert found["LoRA, rank 16"]["loss"] < found["base"]["loss"]
