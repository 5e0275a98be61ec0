"""JSON that does not have a row on each line, under the name .jsonl: held against json.loads, in bounded memory."""

import json
import random
import tracemalloc

import pytest

from ftjax.data.read import files, json_values, spans
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

ROWS = [
    {"text": "a é 🙂"},
    {"text": 'b "[{,]}" \\\n', "n": 12345},
    {"text": "c", "deep": [{"x": [1, {}]}], "n": -1.5e3},
]


def read(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sources([{"source": str(path)}], **options)


def fields(rows):
    return [rows.raw(i) for i in range(len(rows))]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.jsonl"


def joined(rows, indent, between="\n"):
    return between.join(json.dumps(row, indent=indent, ensure_ascii=False) for row in rows) + "\n"


LAYOUTS = {
    "a list on a line": json.dumps(ROWS),
    "a list over lines": json.dumps(ROWS, indent=2),
    "a list, a row on each line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
    "objects over lines": joined(ROWS, 2),
    "objects over lines, close together": joined(ROWS, "\t", ""),
    "objects over lines, far apart": "\n\r\n" + joined(ROWS, 1, "\r\n\r\n \n"),
    "objects on one line": joined(ROWS, None, " "),
    "objects on lines with commas": joined(ROWS, None, ",\n"),
    "objects with a comma after each": joined(ROWS, None, ",\n").rstrip() + ",\n",
    "objects on one line, close together": joined(ROWS, None, ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_found_however_they_stand_and_wherever_blocks_end(path, name, monkeypatch):
    assert fields(read(path, LAYOUTS[name])) == ROWS
    assert fields(read(path, LAYOUTS[name].encode("utf-8-sig"))) == ROWS
    for size in (1, 2, 3, 7, 50):
        monkeypatch.setattr(files, "BLOCK", size)
        assert fields(read(path, LAYOUTS[name])) == ROWS


def test_rows_have_the_line_on_which_they_begin(path):
    rows = read(path, '{\n"text": "a"\n}\n\n{\n"text": "b"\n}\n{"text": "c"}\n')
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in (1, 5, 8)]
    rows = read(path, '[\n\n{"text": "a"}, {"text": "b"},\n{"text": "c"}]')
    assert [row.origin for row in rows] == [f"{path}:3[0]", f"{path}:3[1]", f"{path}:4[2]"]
    rows = read(path, '{"text": "a"} {"text": "b"}\n{"text": "c"}\n')
    assert [row.origin for row in rows] == [f"{path}:1[0]", f"{path}:1[1]", f"{path}:2[2]"]


def test_a_bad_row_is_one_of_its_own_where_rows_are_whole_json(path):
    content = json.dumps([{"text": "a"}, {"foo": 1}, 7, {"text": "d"}], indent=1)
    with pytest.raises(UserError, match=rf"^{path}:5\[1\]: fits no known format"):
        list(read(path, content))
    assert [row.fields["text"] for row in read(path, content, max_bad_rows=2)] == ["a", "d"]


BROKEN = {
    "a comma too many": ('{\n"text": "a"\n}\n{\n"text": "b",\n}\n', ":6: not JSON .*in the row that begins on line 4"),
    "an open string": ('[{"text": "a"},\n{"text": "b\n"}]', ":2: not JSON .Invalid control character"),
    "an open row": (
        '{\n"text": "a"\n}\n{\n"text": "b"',
        ":5: not JSON .Expecting ',' delimiter at column 12, in .* line 4",
    ),
    "a word": ('{\n"text": "a"\n}\nmore', ":4: not JSON .Expecting value at column 1.; write one object"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("size", [3, 2**22])
def test_what_is_broken_is_refused_with_its_line(path, content, message, size, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", size)
    with pytest.raises(UserError, match=f"^{path}{message}"):
        read(path, content, max_bad_rows=5)


def test_a_first_line_that_is_cut_off_is_a_bad_row_and_not_the_start_of_all_others(path):
    rows = read(path, '{"text": ["a\n{"text": "b"}\n{"text": "c"}\n', max_bad_rows=1)
    assert [row.fields["text"] for row in rows] == ["b", "c"]
    rows = read(path, '{"text": "a"} b\n{"text": "b"}\n{"text": "c"}\n', max_bad_rows=1)
    assert [row.fields["text"] for row in rows] == ["b", "c"]
    rows = read(path, '{"text": [\n{"text": "b"}\n{"text": "c"}\n', max_bad_rows=1)
    assert [row.fields["text"] for row in rows] == ["b", "c"]


def test_a_long_list_is_indexed_without_holding_it(path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 2**16)
    rng = random.Random(0)
    rows = [{"text": "x" * rng.randrange(1, 4000), "i": i} for i in range(4000)]
    path.write_text(json.dumps(rows, indent=1))
    rows = [row["i"] for row in rows]
    tracemalloc.start()
    found = read_sources([{"source": str(path)}])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [found.raw(i)["i"] for i in (0, 17, 3999)] == [0, 17, 3999]
    assert len(found) == 4000
    assert path.stat().st_size > 7 * 2**20
    assert peak < 2**20


def test_a_row_without_an_end_is_not_read_to_the_end_of_the_file(path, monkeypatch):
    monkeypatch.setattr(spans, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCK", 100)
    with pytest.raises(UserError, match=r"a.jsonl:1: the line is longer"):
        read(path, '[{"text": "' + "x" * 100_000)
    assert json_values.layout(next(iter(files.resolve(str(path))))) == "list"
