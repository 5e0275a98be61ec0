"""Rows of JSONL files: three formats load, and bad files are refused with file, line and mend (RELIABILITY 36, 37)."""

import json
import logging
import tracemalloc

import pytest

from ftjax.data import rows
from ftjax.data.example import Row
from ftjax.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é"}]}
GOOD = [CHAT, {"prompt": "2+2=", "completion": "4"}, {"text": "Once"}]


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


def test_reads_the_three_formats_and_keeps_their_fields_with_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, b"\n", {**GOOD[1], "id": 7}, b'{"text": "Once"}')
    assert rows.read_rows(path) == [Row(CHAT, f"{path}:1"), Row(GOOD[1], f"{path}:3"), Row(GOOD[2], f"{path}:4")]


def test_a_glob_reads_its_files_in_sorted_order(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.jsonl", {"text": name})
    assert [row.fields["text"] for row in rows.read_rows(str(tmp_path / "*.jsonl"))] == ["a", "b", "c"]
    odd = write(tmp_path / "x[1].jsonl", {"text": "odd"})
    assert [row.fields["text"] for row in rows.read_rows(odd)] == ["odd"]


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    row = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert rows.read_rows(write(tmp_path / "a.jsonl", row))[0].fields == row


def test_format_says_which_fields_of_a_row_to_take(tmp_path):
    path = write(tmp_path / "a.jsonl", {**CHAT, "text": "Once"})
    assert rows.read_rows(path, format="text")[0].fields == {"text": "Once"}
    with pytest.raises(UserError, match=r"a.jsonl:1: fits the formats messages and text; set `format`"):
        rows.read_rows(path)


def test_rows_of_a_task_are_checked_and_named():
    assert [row.origin for row in rows.check_rows(GOOD, "task:tickets")] == [f"task:tickets[{i}]" for i in range(3)]
    with pytest.raises(UserError, match=r"task:tickets\[1\]: text is empty"):
        rows.check_rows([{"text": "a"}, {"text": " "}], "task:tickets")


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


BAD_ROWS = {
    "not JSON": (b"{'text': 1}\n", "not JSON .*column 2.*one whole JSON object"),
    "cut off": (b'{"text": "a"\n', "not JSON"),
    "two objects": (b'{"text": "a"}{"text": "b"}\n', "not JSON"),
    "not an object": (b'["text"]\n', "a JSON list, not an object"),
    "NaN": (b'{"text": "a", "score": NaN}\n', "NaN is not a JSON number"),
    "endless integer": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "not plain JSON"),
    "deep nesting": (b'{"text": ' + b"[" * 200_000 + b"\n", "nested too deeply|not JSON"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', "not UTF-8 at byte 13 .*convert"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}\n', "lone surrogate .*character 1; remove"),
    "unknown fields": (
        {"instruction": "a", "output": "b"},
        r"\['instruction', 'output'\].*messages.*prompt.*text.*rename",
    ),
    "null text": ({"text": None}, "no known format"),
    "text is a number": ({"text": 3}, "text is a int, not a string"),
    "empty text": ({"text": "  "}, "text is empty"),
    "empty prompt": ({"prompt": "", "completion": "a"}, "prompt is empty"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "string and list": ({"prompt": "a", "completion": CHAT["messages"][1:]}, "completion is a list, not a string"),
    "completion by the user": ({"prompt": CHAT["messages"], "completion": CHAT["messages"]}, "starts with a user turn"),
    "completion without answer": ({"prompt": CHAT["messages"], "completion": []}, "non-empty list"),
    "messages is a string": ({"messages": "Hi"}, "messages must be a non-empty list"),
    "no messages": ({"messages": []}, "messages must be a non-empty list"),
    "message is a string": ({"messages": ["Hi"]}, "message 0 is a str"),
    "bad role": (
        chat(("human", "Hi"), ("assistant", "Hello")),
        "message 0 has the role 'human'; use one of system, user",
    ),
    "no role": ({"messages": [{"content": "Hi"}]}, "message 0 has the role None"),
    "null content": (chat(("user", "Hi"), ("assistant", None)), r"message 1 \(assistant\): content is a NoneType"),
    "content in parts": (chat(("user", [{"type": "text", "text": "Hi"}])), r"message 0 \(user\): content is a list"),
    "empty answer": (chat(("user", "Hi"), ("assistant", "\n")), "message 1 is an empty assistant turn; remove it"),
    "no answer": (chat(("user", "Hi")), "no assistant turn"),
    "answer first": (chat(("assistant", "Hi")), "starts with an assistant turn; put a user turn"),
    "bad weight": (chat(("user", "Hi"), ("assistant", "a"), weight=0.5), "has the weight 0.5; use 0"),
    "tool calls": (chat(("user", "Hi"), ("assistant", "a"), tool_calls=[{}]), "tool_calls"),
    "tools": ({**CHAT, "tools": [{"type": "function"}]}, "`tools` cannot be trained on yet"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line_or_skipped_on_demand(tmp_path, caplog, line, message):
    path = write(tmp_path / "bad.jsonl", CHAT, line, {"text": "last"})
    with pytest.raises(UserError, match=f"(?s)^{path}:2: .*({message})"):
        rows.read_rows(path)
    with caplog.at_level(logging.WARNING):
        assert [row.origin for row in rows.read_rows(path, max_bad_rows=1)] == [f"{path}:1", f"{path}:3"]
    assert f"skipped 1 bad rows of 3 (at most 1 allowed); first: {path}:2" in caplog.text


def test_skipping_is_capped(tmp_path):
    path = write(tmp_path / "bad.jsonl", CHAT, b"x\n", b"y\n", CHAT, b"z\n")
    assert len(rows.read_rows(path, max_bad_rows=3)) == 2
    with pytest.raises(UserError, match=r"more than 2 bad rows; mend them .*bad.jsonl:2: .*bad.jsonl:5: "):
        rows.read_rows(path, max_bad_rows=2)
    with pytest.raises(UserError, match="no rows"):
        rows.read_rows(write(tmp_path / "all.jsonl", b"x\n"), max_bad_rows=1)


def test_a_giant_line_is_refused_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 2**20)
    path = write(
        tmp_path / "giant.jsonl",
        {"text": "a"},
        {"text": "x" * (16 * 2**20)},
        {"text": "b"},
        b'{"text": "' + b"y" * 2**22,
    )
    tracemalloc.start()
    with pytest.raises(UserError, match=r"giant.jsonl:2: the line is longer than 1 MiB; split"):
        rows.read_rows(path)
    kept = rows.read_rows(path, max_bad_rows=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.fields["text"] for row in kept] == ["a", "b"]
    assert peak < 8 * 2**20


BAD_SOURCES = {
    "BOM": (b'\xef\xbb\xbf{"text": "a"}\n', "bad.jsonl:1: starts with a byte order mark; save"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "bad.jsonl:1: starts with a byte order mark; save"),
    "empty": (b"", "bad.jsonl: the file has no rows; fill it"),
    "blank lines": (b"\n \n", "bad.jsonl: the file has no rows"),
}


@pytest.mark.parametrize(("content", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_files_are_refused_even_where_rows_may_be_skipped(tmp_path, content, message):
    write(tmp_path / "aa.jsonl", CHAT)
    write(tmp_path / "bad.jsonl", content)
    with pytest.raises(UserError, match=message):
        rows.read_rows(str(tmp_path / "*.jsonl"), max_bad_rows=10)


def test_sources_that_are_no_jsonl_file_are_refused(tmp_path):
    path = write(tmp_path / "a.json", CHAT)
    for source, message in [
        (str(tmp_path / "none*.jsonl"), "no such file; check"),
        (str(tmp_path), r"is a directory; name the files, for example .*/\*.jsonl"),
        (path, "not a .jsonl file; write"),
        ("task:tickets", "this kind of source cannot"),
        ("hf:org/name", "this kind of source cannot .*use"),
    ]:
        with pytest.raises(UserError, match=f"^{source.replace('*', '.')}: {message}"):
            rows.read_rows(source)
    good = write(tmp_path / "a.jsonl", CHAT)
    with pytest.raises(UserError, match=r"a.jsonl: a file has no split 'test'; drop"):
        rows.read_rows(good, split="test")
    with pytest.raises(UserError, match=r"'message' is unknown; known: messages, .*did you mean 'messages'"):
        rows.read_rows(good, format="message")
    with pytest.raises(UserError, match=r"a.jsonl:1: does not fit the format 'text': it has the fields \['messages'\]"):
        rows.read_rows(good, format="text")
