"""What code of a model may do: compute, and write into its own directory. Everything else ends it."""

import math
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


GRADE = "def grade(sample, item):\n    return len(sample['output_text']) / item['n']\n"


def test_a_function_of_strangers_returns_its_number():
    assert sandbox.call(GRADE, "grade", [{"output_text": "abc"}, {"n": 6}]) == (0.5, "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return 'no number'", "ValueError: could not convert"),
        ("return [1]", "TypeError: "),
        ("import time; time.sleep(60)", "more than 1 s"),
        ("import os; os._exit(0)", "ended early"),
        ("return float(open('/etc/passwd').read())", "PermissionError: [Errno 13] Permission denied"),
        ("import os; return os.listdir('/')", "PermissionError: [Errno 13] Permission denied"),
        ("return open('/proc/self/environ').read()", "PermissionError: [Errno 13] Permission denied"),
        # The guards within Python undone, the kernel's stay.
        ("import __main__; __main__._REFUSED = (); import os; return os.execv('/bin/true', ['true'])", "Perm"),
        ("import __main__; __main__._WRITING = 0; open('/tmp/x-of-a-grader', 'w'); return 1", "PermissionError"),
    ],
)
def test_a_function_of_strangers_reaches_nothing(body, reason):
    value, said = sandbox.call(f"def grade(sample, item):\n    {body}\n", "grade", [{}, {}], wall_seconds=1)
    assert math.isnan(value)
    assert said.startswith(reason)


def test_strangers_have_files_of_their_own():
    code = "def grade(sample, item):\n    open('a', 'w').write('3')\n    return open('a').read()\n"
    assert sandbox.call(code, "grade", [{}, {}]) == (3.0, "")


def test_code_of_strangers_is_not_run_where_the_kernel_does_not_help(monkeypatch):
    monkeypatch.setattr(sandbox, "_namespaces", list)
    with pytest.raises(UserError, match="lacks `unshare`"):
        sandbox.call(GRADE, "grade", [{}, {}])
