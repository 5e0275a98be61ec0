"""JSON Lines: the index finds the rows that splitting finds, and bad lines and files are refused (RELIABILITY 36)."""

import json
import random
import subprocess
import sys
import tracemalloc

import pytest

from ftjax.data.read import jsonl, spans
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

GOOD = {"text": "Once"}


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


def read(source, **options):
    return read_sources([{"source": source}], **options)


def test_the_index_finds_the_lines_that_splitting_finds_wherever_blocks_end():
    rng = random.Random(0)
    pieces = [b'{"a":1}', b"x", b" ", b"\t\n", b"\r\n", b"\n", b"\n", b"\x0b", "é".encode()]
    for _ in range(3000):
        text = b"".join(rng.choices(pieces, k=rng.randrange(30)))
        wanted = [(number, line.strip()) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
        size = rng.randrange(1, 9)
        starts, lines, _ = jsonl._index(text[i : i + size] for i in range(0, len(text), size))
        numbers = range(1, len(starts)) if lines is None else lines.tolist()
        assert [(n, text[a:b].strip()) for n, a, b in zip(numbers, starts, starts[1:], strict=False)] == wanted, text


def test_rows_have_the_line_they_stand_on(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, b"\n", b' \t{"text": "two"}\r\n', b"\r\n", b'{"text": "last"}')
    rows = read(path)
    assert [(row.origin, row.fields["text"]) for row in rows] == [
        (f"{path}:1", "Once"),
        (f"{path}:3", "two"),
        (f"{path}:5", "last"),
    ]


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
    "unknown fields": ({"foo": 1}, r"fits no known format.*\['foo'\].*rename"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line_or_skipped_on_demand(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", GOOD, line, {"text": "last"})
    with pytest.raises(UserError, match=f"(?s)^{path}:2: .*({message})"):
        list(read(path))
    assert [row.origin for row in read(path, max_bad_rows=1)] == [f"{path}:1", f"{path}:3"]


def test_a_giant_line_is_refused_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "MAX_ROW_BYTES", 2**20)
    giant = {"text": "x" * (48 * 2**20)}
    path = write(tmp_path / "giant.jsonl", {"text": "a"}, giant, {"text": "b"}, b'{"text": "' + b"y" * 2**22)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"giant.jsonl:2: the line is longer than 1 MiB; split"):
        list(read(path))
    kept = list(read(path, max_bad_rows=2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.fields["text"] for row in kept] == ["a", "b"]
    assert peak < 24 * 2**20


BAD_FILES = {
    "half UTF-16": (b'\xff\xfe{\0\n\0"', r"bad.jsonl:2: the file starts with the mark of utf-16-le, but is not"),
    "text after a list": (b'[{"text": "a"}]\n[{"text": "b"}]\n', r"bad.jsonl:2: not JSON \(Extra data at column 1\)"),
    "an open list": (b'[{"text": "a"},\n', r"bad.jsonl:2: not JSON \(Expecting value"),
    "empty": (b"", "bad.jsonl: the file has no rows; fill it"),
    "blank lines": (b"\n \n", "bad.jsonl: the file has no rows"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_when_they_are_opened_even_where_rows_may_be_skipped(tmp_path, content, message):
    write(tmp_path / "aa.jsonl", GOOD)
    write(tmp_path / "bad.jsonl", content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "*.jsonl"), max_bad_rows=10)


def open_large(tmp_path, n):
    """Peak resident memory (MB), seconds to open and microseconds a row in random order, in a process of its own."""
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for start in range(0, n, 100_000):
            lines = (
                f'{{"prompt": "What is {i} plus {i % 977}, and why does anyone want to know?", "completion": "It is '
                f'{i + i % 977}. Sums are everywhere, from the till in the corner shop to the stars."}}\n'
                for i in range(start, min(n, start + 100_000))
            )
            file.write("".join(lines))
    code = (
        "import random, sys, time\n"
        "from ftjax.data.read.sources import read_sources\n"
        # Not ru_maxrss: after a fork it is at least what the process that forked had.
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith('VmHWM'))\n"
        "before = peak()\n"
        "start = time.perf_counter()\n"
        "rows = read_sources([{'source': sys.argv[1]}])\n"
        "opened = time.perf_counter()\n"
        "order = random.Random(0).sample(range(len(rows)), 20_000)\n"
        "for i in order:\n"
        "    assert rows.check(i).fields['completion'].startswith(f'It is {i + i % 977}.')\n"
        "done = time.perf_counter()\n"
        "print(len(rows), peak(), peak() - before, opened - start, (done - opened) / 20_000 * 1e6)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=600
        )
    finally:
        path.unlink()
    rows, *figures = map(float, done.stdout.split())
    assert rows == n
    return figures


def test_200_000_rows_open_in_the_memory_of_their_index(tmp_path, record_figure):
    peak, grown, seconds, access = open_large(tmp_path, 200_000)
    record_figure("peak_mb", peak)
    record_figure("grown_mb", grown)
    record_figure("seconds_to_open", seconds)
    record_figure("microseconds_a_row", access)
    assert grown < 64  # 2 MB of index and 4 MB of block, with what it takes to look for line ends in it


@pytest.mark.slow
def test_ten_million_rows_open_in_bounded_memory(tmp_path, record_figure):
    peak, grown, seconds, access = open_large(tmp_path, 10_000_000)
    record_figure("peak_mb", peak)
    record_figure("grown_mb", grown)
    record_figure("seconds_to_open", seconds)
    record_figure("microseconds_a_row", access)
    assert peak < 256
    assert access < 1000
