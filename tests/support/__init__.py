"""Helpers of the tests: small models and runs, witnesses, and scripts that tests start as processes of their own."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(SUPPORT.parent)])  # with which the scripts here import what they need
