"""Mistakes in a config file are told in one message that names the mend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from ml_collections import config_flags
from ftjax import cli
config_flags.DEFINE_config_file("config")
cli.run(lambda argv: 0)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.train = 'rows.jsonl'", "train must be a tuple, also where it holds only one; write ('rows.jsonl',)"),
        ("data.eval = {'source': 'a'}", "eval must be a tuple, also where it holds only one; write ({...},)"),
        ("data.max_length = 'x'", "max_length must be of the type int, and 'x' is of str"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_way_to_write_it(tmp_path, line, message):
    path = tmp_path / "config.py"
    path.write_text(
        "from ftjax import config as configs\n"
        f"def get_config():\n    config = configs.defaults()\n    config.{line}\n    return config\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--config={path}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, f"error: the config was refused: {message}\n")
