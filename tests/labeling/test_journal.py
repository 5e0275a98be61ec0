"""labels.jsonl: a judgement is on the disk when it is said to be, and nothing is lost or made up after a kill."""

import json
import os

import pytest

from ftjax.errors import UserError
from ftjax.labeling import journal
from ftjax.labeling.journal import Journal, Label

TIME = "2026-11-27T02:00:00+00:00"


def label(pair, choice="a", who="anna"):
    return Label(pair, who, choice, "b", 2.5, TIME)


def test_judgements_are_lines_that_are_synced_one_by_one(tmp_path, monkeypatch):
    path, synced = tmp_path / "labels.jsonl", []
    kept = Journal(path, ["p", "q"])
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (fsync(number), synced.append(path.read_text().count("\n"))))
    kept.add(label("p"))
    kept.add(label("q", "tie"))
    assert kept.undo("anna") == "q"
    kept.add(label("q", "skip"))
    assert synced == [1, 2, 3, 4]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == label("p")._asdict()
    assert {**lines[2], "time": ""} == {"pair": "q", "labeler": "anna", "choice": "undo", "time": ""}
    again = Journal(path, ["p", "q"])
    assert again.labels == kept.labels == {"p": {"anna": label("p")}, "q": {"anna": label("q", "skip")}}
    assert again.history == {"anna": ["p", "q"]}
    assert [again.undo("anna"), again.undo("anna"), again.undo("anna"), again.undo("ben")] == ["q", "p", None, None]


def test_a_line_that_a_kill_left_unfinished_is_dropped_and_said(tmp_path):
    path = tmp_path / "labels.jsonl"
    Journal(path, ["p"]).add(label("p"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"pair": "p", "labeler": "b\xc3')
    kept = Journal(path, ["p"])
    assert kept.dropped == '{"pair": "p", "labeler": "b\ufffd'
    assert kept.labels == {"p": {"anna": label("p")}}
    assert path.read_bytes() == whole
    kept.add(label("p", "b", "ben"))
    assert Journal(path, ["p"]).labels["p"].keys() == {"anna", "ben"}


def test_a_write_that_fails_leaves_nothing_of_its_line(tmp_path, monkeypatch):
    kept = Journal(tmp_path / "labels.jsonl", ["p"])

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            kept.add(label("p"))
    assert kept.labels == {}
    kept.add(label("p", "b"))
    assert Journal(tmp_path / "labels.jsonl", ["p"]).labels["p"]["anna"].choice == "b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "labels.jsonl:2: is no judgement"),
        ('{"pair": "p", "labeler": "anna", "choice": "c", "left": "a", "seconds": 1, "time": ""}', "choice 'c'"),
        ('{"pair": "p", "labeler": "anna", "choice": "a"}', "labels.jsonl:2: is no judgement"),
        ("[]", "labels.jsonl:2: is no judgement"),
        (json.dumps(label("other")._asdict()), "labels.jsonl:2: is about the pair other, which candidates.jsonl"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(label("p")._asdict()) + "\n" + line + "\n")
    before = path.read_text()
    with pytest.raises(UserError, match=message):
        Journal(path, ["p"])
    assert path.read_text() == before


def test_a_directory_belongs_to_one_command_at_a_time(tmp_path):
    with (
        journal.opened(tmp_path, []),
        pytest.raises(UserError, match="another ftjax"),
        journal.opened(tmp_path, []),
    ):
        pass
    with journal.opened(tmp_path, []):
        pass
