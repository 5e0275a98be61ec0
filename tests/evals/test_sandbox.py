"""What code of a model may do: compute, and write into its own directory. Everything else ends it."""

import time

import pytest

from ftjax.errors import UserError
from ftjax.evals import sandbox

PASSES = """
import tempfile, pathlib, dataclasses, os
@dataclasses.dataclass
class Point:
    x: "int"
pathlib.Path("a.txt").write_text("a")
os.rename("a.txt", "b.txt")
with tempfile.TemporaryDirectory() as directory:
    open(directory + "/c", "w").close()
print(Point(3))
assert pathlib.Path("b.txt").read_text() == "a" and "PATH" not in os.environ and "HOME" not in os.environ
"""


def test_code_computes_and_writes_where_it_is():
    assert sandbox.run(PASSES) == ""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended early"),
        (
            "import os\nfor i in range(20):\n  try: os.write(i, b'passed')\n  except OSError: pass\nos._exit(0)",
            "passed",
        ),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("x = bytearray(2 << 30)", "MemoryError: "),
        ("open('big', 'wb').write(bytes(2 << 20))", "OSError: [Errno 27] File too large"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "PermissionError: socket."),
        ("import os; os.system('true')", "PermissionError: os.system is not allowed"),
        ("import os; os.kill(1, 9)", "PermissionError: os.kill is not allowed"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("(", "SyntaxError: '(' was never closed"),
    ],
)
def test_everything_else_ends_it(code, reason):
    assert sandbox.run(code).startswith(reason)


def test_files_elsewhere_are_left_alone(tmp_path):
    kept = tmp_path / "kept" / "a.txt"
    kept.parent.mkdir()
    kept.write_text("a")
    for code in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import shutil; shutil.rmtree({str(kept.parent)!r})",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'w')",
    ):
        assert "outside of the working directory" in sandbox.run(code), code
    assert kept.read_text() == "a"


def test_code_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    began = time.monotonic()
    assert sandbox.run("while True: pass") == "more processor time than it may use"
    assert time.monotonic() - began < sandbox.WALL_SECONDS


def test_without_namespaces_the_guards_hold(monkeypatch):
    monkeypatch.setattr(sandbox, "_namespaces", list)
    assert sandbox.run(PASSES) == ""
    assert sandbox.run("import time; time.sleep(60)", wall_seconds=1) == "more than 1 s"
    assert sandbox.run("import socket; socket.socket()").startswith("PermissionError: socket.")


def test_a_process_that_does_not_start_is_no_failure_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "absent.py")
    with pytest.raises(UserError, match=r"did not start: .*absent\.py"):
        sandbox.run("x = 1")


def test_namespaces_have_no_network():
    if not sandbox._namespaces():
        pytest.skip("this user may make no namespaces")
    # Reading is allowed, and says which networks the process has: the loopback alone.
    read = "lines = open('/proc/self/net/dev').read().splitlines()[2:]"
    code = f"{read}\nassert [line.split(':')[0].strip() for line in lines] == ['lo']"
    assert sandbox.run(code) == ""
