"""JSON files: every place that a list of rows may have, held against json.loads."""

import json
import random

import pytest

from ftjax.data.read import json_rows
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

ROWS = [{"text": "a é 🙂"}, {"text": 'b "[{,]}" \\'}, {"text": "c", "deep": [{"x": [1, {}]}], "n": -1.5e3}]


def read(path, content=None, **options):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sources([{"source": str(path)}], **options)


def texts(rows):
    return [row.fields["text"] for row in rows]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.json"


PLACES = {
    "a list": lambda rows: rows,
    "under data": lambda rows: {"version": "1", "data": rows, "others": [1]},
    "the only list": lambda rows: {"meta": {"a": [1]}, "items": rows, "n": 3},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_rows_are_found_where_they_may_be(path, place, ascii, indent):
    rows = read(path, json.dumps(place(ROWS), indent=indent, ensure_ascii=ascii))
    assert texts(rows) == [row["text"] for row in ROWS]
    assert texts(rows[i] for i in (2, 0)) == [ROWS[2]["text"], ROWS[0]["text"]]


def test_random_values_are_cut_where_json_cuts_them(path):
    rng = random.Random(3)

    def value(depth):
        kinds = [str, float, int, bool, type(None)] + [list, dict] * (depth < 3)
        kind = rng.choice(kinds)
        if kind is list:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind is dict:
            return {f"k{i}": value(depth + 1) for i in range(rng.randrange(4))}
        return {str: rng.choice(["", "],[", '"', "}\n", "é"]), float: rng.random(), int: 7, bool: True}.get(kind)

    rows = [{"text": f"t{i}", "more": value(0)} for i in range(300)]
    found = read(path, json.dumps(rows, indent=rng.choice([None, 2])))
    assert [found.sources[0].records[i] for i in range(300)] == rows


def test_rows_have_their_line_and_place(path):
    rows = read(path, '[\n {"text": "a"}, {"text": "b"},\n\n {"text": "c"}]')
    assert [row.origin for row in rows] == [f"{path}:2[0]", f"{path}:2[1]", f"{path}:4[2]"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_byte_order_mark_is_read(path, place, encoding):
    rows = read(path, json.dumps(place(ROWS), indent=1, ensure_ascii=False).encode(encoding))
    assert texts(rows) == [row["text"] for row in ROWS]
    assert rows.digest() == read(path, json.dumps(place(ROWS), indent=1, ensure_ascii=False)).digest()


def test_json_lines_under_the_name_of_json_are_read_as_such(path):
    rows = read(path, "".join(json.dumps(row) + "\n" for row in ROWS))
    assert texts(rows) == [row["text"] for row in ROWS]
    assert rows[1].origin == f"{path}:2"
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    assert len(read(path, json.dumps(chat))) == 1


BAD_ROWS = {
    "not an object": ('"text"', "a JSON str, not an object"),
    "NaN": ('{"text": "a", "x": NaN}', "NaN is not a JSON number"),
    "endless integer": ('{"text": "a", "n": ' + "1" * 5000 + "}", "not plain JSON"),
    "a name twice": ('{"text": "a", "text": "b"}', "two members are called 'text'"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_with_their_place_or_skipped_on_demand(path, row, message):
    row = row if isinstance(row, bytes) else row.encode()
    content = b'[{"text": "a"},\n' + row + b',\n{"text": "c"}\n]\n'
    with pytest.raises(UserError, match=rf"^{path}:2\[1\]: .*{message}"):
        list(read(path, content))
    assert texts(read(path, max_bad_rows=1)) == ["a", "c"]


BAD_FILES = {
    "cut off": ('[{"text": "a"},\n{"text": ', r":2: not JSON \(Expecting value at column 10\)"),
    "no comma": ('[{"text": "a"}\n{"text": "b"}]', ":2: not JSON .Expecting ',' delimiter at column 1"),
    "comma at the end": ('[{"text": "a"},]', ":1: not JSON"),
    "a string": ('"text"', ":1: not JSON .Expecting a list or an object"),
    "bad member": ('{"data" 3}', ":1: not JSON .Expecting ':'"),
    "no quotes": ("{data: []}", ":1: not JSON .Expecting property name"),
    "several lists": ('{"a": [], "b": []}', r": an object with several lists in it \(a, b\); name"),
    "no list": ('{"a": 1}', ": an object with no list in it"),
    "empty": ("", ": the file has no rows"),
    "empty list": (" [ ] ", ": the file has no rows"),
    "two lists": ('[{"text": "a"}]\n[{"text": "b"}]', r":2: not JSON .Extra data at column 1\)"),
    "more after the list": ('[{"text": "a"}] x', r":1: not JSON .Extra data at column 17\)"),
    "a name twice": ('{"data": [{"text": "a"}],\n"data": [{"text": "b"}]}', ": two members are called 'data'"),
    "too deep": ("[" * 200_000, ":1: nested too deeply"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_when_they_are_opened(path, content, message):
    with pytest.raises(UserError, match=f"^{path}{message}"):
        read(path, content, max_bad_rows=10)


def test_what_is_too_large_to_hold_is_refused_with_the_way_out(path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match=r"or JSON Lines, .* with: jq -c '.data\[\]' \S*a.json > rows.jsonl"):
        read(path, json.dumps({"data": ROWS}))
    assert texts(read(path, json.dumps(ROWS))) == [row["text"] for row in ROWS]  # a list is not held


def test_a_name_twice_in_a_line_of_json_lines_is_a_bad_row_of_its_own(path):
    twice = '{"messages": [], "messages": [{"role": "user", "content": "Hi", "content": "Ho"}]}'
    with pytest.raises(UserError, match=rf"^{path}:1: two members are called '(messages|content)'; keep one"):
        list(read(path, twice + '\n{"text": "b"}\n'))
    assert texts(read(path, max_bad_rows=1)) == ["b"]
