"""Rows of several sources as one lazy sequence: random access, bad rows, the hold-out, pickling and the digest."""

import json
import logging
import multiprocessing
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from ftjax.data.audit import curation
from ftjax.data.pipeline import DataSpec
from ftjax.data.read import files
from ftjax.data.read.rows import BadRows
from ftjax.data.read.sources import read_sources
from ftjax.errors import SourceError, UserError
from ftjax.inspection import survey

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é"}]}


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


def texts(rows):
    return [row.fields["text"] for row in rows]


def read(*sources, **options):
    return read_sources([{"source": source} for source in sources], **options)


@pytest.fixture
def two(tmp_path):
    a = write(tmp_path / "a.jsonl", *({"text": f"a{i}"} for i in range(5)))
    b = write(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(3)))
    return a, b


def test_sources_follow_one_another_and_are_kept_apart(two):
    rows = read(*two)
    assert texts(rows) == [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)]
    assert texts(rows[i] for i in (6, 0, 7, 4)) == ["b1", "a0", "b2", "a4"]
    assert rows.per_source == [(two[0], 5), (two[1], 3)]
    assert [rows.source_of(i) for i in range(8)] == [0] * 5 + [1] * 3
    assert rows.origin(6) == rows[6].origin == f"{two[1]}:2"
    for i in (-1, 8):
        with pytest.raises(IndexError):
            rows[i]


def test_weights_are_handed_on(two):
    rows = read_sources([{"source": two[0], "weight": 2}, {"source": two[1]}])
    assert rows.weights([1, 1]) == [2.0, 1.0]
    assert len(rows) == 8


def test_nothing_is_parsed_before_it_is_asked_for(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", {"text": "a"}, b"not JSON\n", {"text": "b"}))
    assert (len(rows), rows[2].fields) == (3, {"text": "b"})
    with pytest.raises(UserError, match=r"a.jsonl:2: not JSON"):
        rows.check(1)


def test_bad_rows_are_skipped_as_far_as_allowed_and_counted(tmp_path, caplog):
    path = write(tmp_path / "bad.jsonl", CHAT, b"x\n", b"y\n", CHAT, b"z\n")
    with caplog.at_level(logging.WARNING):
        assert [row.origin for row in read(path, max_bad_rows=3)] == [f"{path}:1", f"{path}:4"]
    assert f"{path}: skipped 3 bad rows of 5 (at most 3 allowed); first: {path}:2: not JSON" in caplog.text
    with pytest.raises(UserError, match=r"more than 2 bad rows; fix them .*bad.jsonl:2: .*bad.jsonl:5: "):
        list(read(path, max_bad_rows=2))
    with pytest.raises(UserError, match=r"^\S*bad.jsonl:2: "):
        list(read(path))
    with pytest.raises(UserError, match=r"all.jsonl: no rows are left of 1, all are bad; first: .*all.jsonl:1"):
        list(read(path, write(tmp_path / "all.jsonl", b"x\n"), max_bad_rows=3))


def test_the_cap_is_for_each_source_on_its_own(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", {"text": name}, b"x\n") for name in "abc"]
    assert texts(read(*paths, max_bad_rows=1)) == ["a", "b", "c"]


def test_bad_rows_found_in_other_processes_are_counted_by_their_messages(two):
    rows = read(*two, max_bad_rows=1)
    bad = BadRows(rows)
    bad.skip(0, "a.jsonl:1: bad")
    bad.skip(6, "b.jsonl:2: bad")
    with pytest.raises(UserError, match=r"more than 1 bad rows.*First: a.jsonl:1: bad; last: a.jsonl:5: bad"):
        bad.skip(4, "a.jsonl:5: bad")
    with pytest.raises(UserError, match=r"^b.jsonl:3: bad$"):
        BadRows(read(*two)).skip(7, "b.jsonl:3: bad")


def test_the_sides_of_the_hold_out_share_no_row_and_miss_none(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(300)))
    here, there = (read(path, holdout=0.2, heldout_side=side) for side in (False, True))
    origins = [{row.origin for row in rows} for rows in (here, there)]
    assert not origins[0] & origins[1]
    assert len(origins[0] | origins[1]) == 300
    assert 30 < len(origins[1]) < 90
    for i in range(300):
        assert (here.check(i) is None) != (there.check(i) is None)


def test_a_side_without_a_row_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"data.holdout = 0.001, none of 1 rows is held out .*set another share"):
        list(read(path, holdout=0.001, heldout_side=True))


def _fields(rows, i):
    return rows[i].fields


def test_rows_are_read_in_threads_and_in_other_processes(two):
    rows = read(*two)
    assert len(rows[3].fields) == 1  # an open file, before processes are started
    wanted = [_fields(rows, i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: _fields(rows, i % 8), range(800))) == wanted * 100
    copy = pickle.loads(pickle.dumps(rows))
    assert [_fields(copy, i) for i in range(8)] == wanted
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(_fields, [(rows, i) for i in range(8)]) == wanted


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    for name in ("before.jsonl", "while.jsonl"):
        rows = read(write(tmp_path / name, {"text": "a"}, {"text": "b"}))
        if name == "while.jsonl":
            assert texts(rows) == ["a", "b"]
        write(tmp_path / name, {"text": "longer"}, {"text": "b"})
        with pytest.raises(UserError, match=rf"{name}: was changed after this run began to read it; start again"):
            rows[0]


def test_the_digest_names_the_contents_and_the_choice_of_rows_not_the_place(tmp_path, two):
    def digest(source=two[0], max_bad_rows=0, holdout=0.0, heldout_side=False, **more):
        return read_sources([{"source": source, **more}], max_bad_rows, holdout, heldout_side).digest()

    content = (tmp_path / "a.jsonl").read_bytes()
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    moved.write_bytes(content)
    changed.write_bytes(content.replace(b"a3", b"a9"))
    assert digest() == digest(str(moved)) == digest(split="train") == digest(limit=5) == digest(weight=2.0)
    others = [
        digest(str(changed)),
        digest(two[1]),
        digest(split="train[:4]"),
        digest(split="train[1:]"),
        digest(limit=2),
        digest(format="text"),
        digest(max_bad_rows=1),
        digest(holdout=0.5),
        digest(holdout=0.4),
        digest(holdout=0.5, heldout_side=True),
        read(two[0], two[1]).digest(),
        read(two[1], two[0]).digest(),
    ]
    assert len({digest(), *others}) == 1 + len(others)


def test_a_file_that_changes_is_never_counted_as_bad_rows(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", *({"text": f"{i}"} for i in range(5)))
    rows = read(path, max_bad_rows=5)
    write(tmp_path / "a.jsonl", {"text": "longer"})
    with pytest.raises(SourceError, match="was changed after this run began"):
        list(rows)
    with pytest.raises(SourceError, match="was changed after this run began"):
        list(curation.records(rows, curation.Drops()))
    settings = DataSpec("conversation", 64, 2, True, "assistant", len(chatml), max_bad_rows=5)
    with pytest.raises(SourceError, match="was changed after this run began"):
        survey.survey(rows, [], chatml, [], settings)
    os.unlink(path)
    with pytest.raises(SourceError, match="cannot be read"):
        files.stamp(tmp_path / "a.jsonl")


def test_a_source_that_is_wholly_on_one_side_of_the_hold_out_is_named(tmp_path, caplog):
    one = write(tmp_path / "one.jsonl", *({"prompt": "same", "completion": f"{i}"} for i in range(20)))
    many = write(tmp_path / "many.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(100)))
    with caplog.at_level(logging.WARNING):
        list(read(one, many, holdout=0.3))
    (message,) = caplog.messages
    assert re.search(r"one.jsonl: data.holdout = 0.3 holds out (none|all 20) of its 20 rows; .*one prompt", message)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        list(read(many, holdout=0.3))
        list(read(one, many, holdout=0.3, heldout_side=True))
    assert not caplog.messages


def test_entries_that_hold_the_same_rows_are_named_with_a_warning(tmp_path, two, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    read("a.jsonl", "b.jsonl")
    read_sources([{"source": "a.jsonl", "split": "[:2]"}, {"source": "a.jsonl", "split": "[2:]"}])
    assert not caplog.messages
    read("a.jsonl", "./a.jsonl")
    assert caplog.messages == [
        "a.jsonl and ./a.jsonl hold the same rows, which count twice; leave one out, or set its weight"
    ]
