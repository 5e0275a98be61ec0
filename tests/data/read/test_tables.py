"""Parquet, as pyarrow and pandas write it: values, nested messages, random access, damage."""

import json
import os
import pickle

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from ftjax.data.read.sources import read_sources
from ftjax.errors import SourceError, UserError


def chat(i):
    return [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": f"What is {i}?"},
        {"role": "assistant", "content": f"A number, {i}. 🙂", "weight": 1},
    ]


def read(path, **options):
    return read_sources([{"source": str(path), **options}])


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "chats.parquet"
    table = pyarrow.Table.from_pylist([{"messages": chat(i), "id": i} for i in range(10_000)])
    pyarrow.parquet.write_table(table, path, row_group_size=3000)
    return path


def test_nested_messages_are_lists_of_dicts_without_what_was_not_there(chats):
    rows = read(chats)
    assert len(rows) == 10_000
    for i in (0, 2999, 3000, 4095, 4096, 9999, 17):
        assert rows.sources[0].records[i] == {"messages": chat(i), "id": i}
        assert rows[i].origin == f"{chats}[{i}]"
    assert rows[5].fields["messages"][1]["content"] == "What is 5?"


def test_rows_are_read_after_pickling_and_slices_and_limits_apply(chats):
    rows = pickle.loads(pickle.dumps(read(chats, split="train[-1%:]", limit=10)))
    ids = [rows.sources[0].records[int(i)]["id"] for i in rows.sources[0].chosen]
    assert len(rows) == 10
    assert all(id >= 9900 for id in ids)
    assert rows[3].fields["messages"][1]["content"] == f"What is {ids[3]}?"


def test_the_digest_is_of_the_contents(chats, tmp_path):
    copy, changed = tmp_path / "copy.parquet", tmp_path / "changed.parquet"
    copy.write_bytes(chats.read_bytes())
    pandas.DataFrame({"text": ["a"]}).to_parquet(changed)
    assert read(chats).digest() == read(copy).digest() != read(changed).digest()


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    frame = pandas.DataFrame(
        {
            "text": ["one", "two"],
            "image": [b"\xff\xd8", None],
            "when": pandas.to_datetime(["2024-01-01", None]),
            "kind": pandas.Categorical(["x", "y"]),
            "score": [float("nan"), 1.0],
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    assert [row.fields for row in read(tmp_path / "a.parquet")] == [{"text": "one"}, {"text": "two"}]


def test_bad_rows_are_named_by_their_number(tmp_path):
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["one", None, " "]}).to_parquet(path)
    assert [row.origin for row in read_sources([{"source": str(path)}], max_bad_rows=2)] == [f"{path}[0]"]
    with pytest.raises(UserError, match=r"a.parquet\[1\]: fits no known format"):
        list(read(path))
    binary = pyarrow.table({"text": pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())})
    pyarrow.parquet.write_table(binary, path)
    with pytest.raises(UserError, match=r"a.parquet\[1\]: text is bytes that are not UTF-8"):
        list(read(path))


def test_a_damaged_file_of_the_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["one"]}).to_parquet(path)
    read(path)
    (cached,) = (tmp_path / "cache" / "tables").iterdir()
    cached.write_bytes(cached.read_bytes()[:50])
    with pytest.raises(UserError, match=r"arrow: this file of the cache is damaged \(.*\); remove it and start again"):
        read(path)


def test_damaged_and_empty_files_are_refused(tmp_path, chats):
    good = chats.read_bytes()
    middle = bytearray(good)
    middle[4:4000] = bytes(3996)
    for content in (b"", b"PAR1", good[: len(good) // 2], good[:-1], bytes(middle), json.dumps({"text": "a"}).encode()):
        path = tmp_path / "bad.parquet"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.parquet: not a readable Parquet file \(.*\); write or copy"):
            read(path)
    pandas.DataFrame({"text": []}).to_parquet(path)
    with pytest.raises(UserError, match=r"bad.parquet: the file has no rows"):
        read(path)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: two columns are called 'text'; name each once"):
        read(tmp_path / "a.parquet")


def test_a_file_replaced_within_the_same_size_and_time_is_read_anew(tmp_path):
    path = tmp_path / "a.parquet"
    for text in ("one", "two"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        os.utime(path, ns=(10**18, 10**18))
        assert [row.fields["text"] for row in read(path)] == [text]


def test_lists_of_messages_are_turned_back_and_arguments_of_calls_are_not(tmp_path):
    arguments = {"from": ["x"], "to": ["y"]}
    call = {"type": "function", "function": {"name": "move", "arguments": arguments}}
    turned = {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    for name, given in {"calls": row, "turned": {"messages": turned}, "input": {"input": {"messages": turned}}}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([given]), tmp_path / f"{name}.parquet")
    found = {name: read(tmp_path / f"{name}.parquet").sources[0].records[0] for name in ("calls", "turned", "input")}
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert found["calls"]["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert found["turned"]["messages"] == found["input"]["input"]["messages"] == plain


def test_a_row_with_an_empty_label_is_refused(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet\[1\]: label is empty; write true or false"):
        list(read(tmp_path / "a.parquet"))


def test_a_damaged_file_of_the_cache_is_never_a_bad_row(chats):
    records = read(chats).sources[0].records
    records._stamp = (0, 0)
    with pytest.raises(SourceError, match="was changed after this run began"):
        records[0]
