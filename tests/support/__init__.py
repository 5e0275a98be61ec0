"""Helpers of the tests: small models and runs, witnesses, and scripts that tests start as processes of their own."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(SUPPORT.parent)])  # with which the scripts here import what they need


def xla_flags(devices: int, *more: str) -> str:
    """XLA_FLAGS for a process with so many virtual CPU devices, which compiles as the tests do."""
    return " ".join([os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", *more])
