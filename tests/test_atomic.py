"""What is written appears whole or not at all, and nothing else is left."""

import errno
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from ftjax import atomic
from ftjax.errors import TransientError, UserError


def failing(block, write):
    with block as temporary:
        write(temporary)
        raise ZeroDivisionError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    atomic.write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        failing(atomic.new_file(path), lambda temporary: temporary.write_text("half of the n"))
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "old"
    with atomic.new_file(path) as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "new"


def test_a_symlink_stays_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, pipe = tmp_path / "there/file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    atomic.write_text(link, "through")
    assert link.is_symlink()
    assert target.read_text() == "through"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    atomic.write_text(pipe, "down")
    reader.join(10)
    assert read == ["down"]
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "there"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/file.json'$"):
        atomic.write_text(tmp_path / "nowhere/file.json", "x")


def test_a_directory_appears_whole_and_none_is_overwritten(tmp_path):
    out = tmp_path / "deep/out"
    with pytest.raises(ZeroDivisionError):
        failing(atomic.new_directory(out), lambda temporary: (temporary / "a").write_text("1"))
    assert os.listdir(tmp_path / "deep") == []
    with atomic.new_directory(out) as temporary:
        (temporary / "a").write_text("1")
        assert not out.exists()
    assert os.listdir(tmp_path / "deep") == ["out"]
    with pytest.raises(UserError, match="exists and is not an empty directory"), atomic.new_directory(out):
        pass


def test_what_a_disk_has_no_room_for_is_named_with_its_size(tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = rf"^{out}: it could not be written \({os.strerror(number)}\). It needs 0.1 MB, and .* are free"
        with pytest.raises(TransientError, match=message), atomic.room_for(out, 100_000):
            raise OSError(number, os.strerror(number), "hidden")
    with pytest.raises(PermissionError), atomic.room_for(out, 1):
        raise PermissionError(errno.EACCES, "no")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_500_000_000))
    with atomic.room_for(out, 2_500_000_000):
        pass
    message = rf"^{out}: there is no room for it. It needs 3.0 GB, and 2.5 GB are free on the disk of {tmp_path};"
    with pytest.raises(TransientError, match=message), atomic.room_for(out, 3_000_000_000):
        raise AssertionError
