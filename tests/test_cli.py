"""A command line ends with one message and its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
"""Says what the config is.

    python -m ftjax.train --config chat
"""
import sys
from ftjax import cli, config_flag
sys.argv[0] = "program"
config_flag.define()
def main(argv):
    print(config_flag.name(), config_flag.value().epochs)
cli.run(main, config_flag.parse)
'''


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--config=chat", "--config.epochs=3"], 0, "chat 3.0\n", ""),
        (["--help"], 0, "python -m ftjax.train --config chat", ""),
        (["--epochs=3"], 2, "", "error: there is no flag --epochs; did you mean --config.epochs=3?\n"),
    ],
)
def test_what_a_command_line_ends_with(arguments, status, out, err):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, err)
    assert out in done.stdout
    assert ("--config:" in done.stdout) == ("--help" in arguments)


ENDS = """
import sys, threading, time
from ftjax import cli
from ftjax.errors import UserError
def main(argv):
    done = threading.Event()
    threading.Thread(target=lambda: (done.wait(float(argv[2])), print("done")), name=cli.UNNEEDED).start()
    if argv[1] == "mistake":
        raise UserError("the checkpoint is damaged")
    print("saved")
    return int(argv[1])
cli.run(main)
"""


@pytest.mark.parametrize(
    ("how", "seconds", "status", "out", "err"),
    [
        ("mistake", 300, 2, "", "error: the checkpoint is damaged\n"),
        ("75", 300, 75, "saved\n", ""),
        ("0", 0.2, 0, "saved\ndone\n", ""),
    ],
)
def test_what_fails_or_is_stopped_does_not_wait_for_what_would_have_followed(how, seconds, status, out, err):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ENDS, how, str(seconds)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@pytest.mark.parametrize("arguments", [["--config=chat"], ["--help"]])
def test_output_that_nobody_reads_ends_it_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


KEEPS = """
import os, jax
from ftjax import cli
os.environ["FTJAX_CACHE"] = "/proc/nowhere"
cli._keep_compiled()
assert not jax.config.jax_compilation_cache_dir  # nothing needs it
os.environ["FTJAX_CACHE"] = {directory!r}
cli._keep_compiled()
assert jax.config.jax_persistent_cache_min_compile_time_secs < 1
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
jax.config.update("jax_compilation_cache_dir", "mine")
cli._keep_compiled()
assert jax.config.jax_compilation_cache_dir == "mine"
"""


def test_what_is_compiled_is_kept_for_later_commands(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    script = KEEPS.format(directory=str(tmp_path))
    subprocess.run([sys.executable, "-c", script], env=environment | {"JAX_PLATFORMS": "cpu"}, check=True)
    assert list(tmp_path.glob("compiled/*/*-cache"))


GIVES_BACK = """
import ctypes, jax
from ftjax import cli
asked = []
class Libc:
    malloc_trim = staticmethod(asked.append)
ctypes.CDLL = lambda name: Libc
cli._LONG = 3600.0
cli._give_back_what_compiling_took()
jax.jit(lambda x: x + 1)(1.0)
assert asked == []  # it was quick
cli._LONG = 0.0
jax.jit(lambda x: x + 2)(1.0)
assert 0 in asked
del Libc.malloc_trim
cli._give_back_what_compiling_took()  # other libraries have none
jax.jit(lambda x: x + 3)(1.0)
"""


def test_what_compiling_took_goes_back_to_the_system():
    subprocess.run([sys.executable, "-c", GIVES_BACK], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
