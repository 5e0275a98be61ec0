"""Helpers of the tests: small models and runs, witnesses, and scripts that tests start as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(SUPPORT.parent)])  # with which the scripts here import what they need


def xla_flags(devices: int, *more: str) -> str:
    """XLA_FLAGS for a process with so many virtual CPU devices, which compiles as the tests do."""
    return " ".join([os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", *more])


def printed_on_devices(program: str, devices: int) -> str:
    """What the text of a program prints, in a process of its own that has so many virtual CPU devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
