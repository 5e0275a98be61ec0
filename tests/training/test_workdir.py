"""A run's directory is tried before the run starts (case 11) and has one run at a time (case 13)."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from ftjax.errors import TransientError, UserError
from ftjax.training import workdir
from ftjax.training.workdir import hold, lock, probe


def test_probe_makes_the_directory_and_leaves_nothing_in_it(tmp_path):
    probe(tmp_path / "runs" / "new")
    assert list((tmp_path / "runs" / "new").iterdir()) == []


def test_probe_rejects_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"workdir .*file/run cannot be written: .*--workdir"):
        probe(tmp_path / "file" / "run")


def test_probe_rejects_a_failing_flush(tmp_path, monkeypatch):
    # A full disk may show only at fsync. (The tests may run as root, whom no permission bit stops.)
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device"):
        probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _other_run(workdir):
    """Another process that takes the lock, says so, and holds it until its stdin closes."""
    code = "import sys; from pathlib import Path; from ftjax.training.workdir import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "held\n"
    return run


def test_a_second_run_is_rejected_with_the_pid_of_the_first(tmp_path):
    with _other_run(tmp_path) as first:
        with pytest.raises(UserError, match=rf"in use by another run \(pid {first.pid}\)"), lock(tmp_path):
            pass
        first.stdin.close()
        assert first.wait(10) == 0
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())


def test_the_lock_of_another_machine_is_waited_for_because_the_machine_may_be_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "_LEASE_SECONDS", 1.0)
    with _other_run(tmp_path) as first:
        (tmp_path / ".lock").write_text(f"{first.pid} another-boot")
        with pytest.raises(TransientError, match=f"pid {first.pid}, on another machine"), lock(tmp_path):
            pass
        monkeypatch.setattr(workdir, "_LEASE_SECONDS", 60.0)
        threading.Timer(1.0, first.kill).start()
        with lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    with lock(tmp_path):
        assert "has no locks" in caplog.text


def test_a_killed_run_lets_go(tmp_path):
    with _other_run(tmp_path) as first:
        first.kill()
        first.wait(10)
    with lock(tmp_path):
        pass


def test_a_run_holds_a_directory_that_it_has_tried(tmp_path):
    with hold(tmp_path / "new"):
        assert {path.name for path in (tmp_path / "new").iterdir()} == {".lock"}
        with pytest.raises(UserError, match="in use by another run"), lock(tmp_path / "new"):
            pass
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"), hold(tmp_path / "file" / "run"):
        pass
