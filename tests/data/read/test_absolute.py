"""Sources that mean the same in every working directory."""

import pytest

from ftjax.data.read.sources import absolute, is_here, read_sources


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory whose name looks like a pattern, with some files."""
    root = tmp_path / "[a] *"
    (root / "saved").mkdir(parents=True)
    for name in ("rows.jsonl", "more.jsonl", "od[d].jsonl"):
        (root / name).write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(root)
    (tmp_path / "at_home.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    return root


@pytest.mark.parametrize(
    ("source", "count"),
    [("rows.jsonl", 1), ("./rows.jsonl", 1), ("*.jsonl", 3), ("od[d].jsonl", 1), ("~/at*.jsonl", 1)],
)
def test_files_and_patterns(here, tmp_path, monkeypatch, source, count):
    assert is_here(source)
    found = absolute(source)
    monkeypatch.chdir(tmp_path)
    assert found.startswith("/")
    assert absolute(found) == found
    assert is_here(found)
    assert len(read_sources([{"source": found}])) == count


def test_directories_of_data_sets(here):
    assert absolute("hf:saved") == f"hf:{here}/saved"
    assert absolute("tfds:saved") == f"tfds:{here}/saved"
    assert absolute("tfds:name:saved") == f"tfds:name:{here}/saved"


@pytest.mark.parametrize(
    "source", ["task:support_ticket", "hf:org/rows", "hf:org/rows:config", "tfds:name", "gs://b/r.jsonl", "/a/r.jsonl"]
)
def test_what_is_no_relative_path_stays(here, source):
    assert absolute(source) == source
    assert not is_here(source)


def test_what_is_missing_is_not_here(here):
    assert not is_here("none.jsonl")
    assert not is_here("none*.jsonl")
