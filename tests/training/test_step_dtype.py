"""Gradients of kernels kept in bfloat16 until they are summed, beside steps that take them in float32."""

import json
import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, SUPPORT, xla_flags

# bfloat16 has 8 bits: rounding to it changes a number by at most 2^-9 of itself.
ROUNDING = 2**-9


@pytest.fixture(scope="module")
def found():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
        "XLA_FLAGS": xla_flags(8),
    }
    script = SUPPORT / "step_run.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_float32_model_trains_to_the_bit_as_without_the_dtype(found):
    assert found["float32 equal"]
    assert found["losses"]["float32"] == found["losses"]["float32 witness"]
    assert found["losses"]["witness"][-1] < 0.99 * found["losses"]["witness"][0], "it learns"


def test_in_bfloat16_steps_differ_by_no_more_than_rounding(found, record_figure):
    """On one device the backward pass makes kernels' gradients in bfloat16 either way.

    Over several, or in micro-batches, each part of a sum is rounded, and so are activations that are summed over
    devices: a few roundings of independent sign to each number, and five steps that build upon one another. Twelve
    roundings is more than that; a wrong sum (a part left out, counted twice) is an eighth or more.
    """
    witness = found["losses"]["witness"]
    cases = [name for name in found["losses"] if name.startswith("bfloat16")]
    assert len(cases) == 4
    for name in cases:
        losses, changes = found["losses"][name], found["changes"][name]
        record_figure(f"{name}: loss", max(abs(a / b - 1) for a, b in zip(losses, witness)))
        record_figure(f"{name}: change of the parameters", max(changes.values()))
        assert max(abs(a / b - 1) for a, b in zip(losses, witness)) < 2 * ROUNDING, name
        assert max(changes.values()) < 12 * ROUNDING, (name, changes)
    assert max(found["changes"]["bfloat16 1"].values()) < ROUNDING
