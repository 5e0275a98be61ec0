"""Files of every text kind with random damage: each row is read or refused with its place, nothing else happens."""

import json
import random

import pytest

from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi ü"}, {"role": "assistant", "content": "Ho"}], "tools": []}
GOOD = [
    CHAT,
    {"prompt": "a\nb", "completion": "c"},
    {"text": 'say "x"'},
    {"prompt": "p", "completion": "c", "label": True},
]
WORDS = [b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\\ud800", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"null"]
WORDS += [b"NaN", b"-1e999", b"1" * 5000, b'"role"', b'"messages"', b"[" * 500, b"\xe2\x80\xa8", b"true", b"  ", b""]


def whole(kind, rng):
    rows = rng.choices(GOOD, k=8)
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode()
    if kind == "json":
        value = rows if rng.random() < 0.5 else {"data": rows, "n": 1}
        return json.dumps(value, indent=rng.choice([None, 1])).encode()
    lines = ["prompt,completion,label"] + [f'"q ""{i}"" é,\n",{i},{rng.choice(["true", "0", ""])}' for i in range(8)]
    return "\n".join(lines).encode()


def damaged(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        cut = rng.choice([0, 0, 1, 3, 40])
        content[at : at + cut] = rng.choice(WORDS)
    return bytes(content)


def try_files(path, kind, n):
    rng = random.Random(f"{kind} {n}")
    read, refused = 0, []
    for i in range(n):
        path = path.with_name(f"{i % 50}.{kind}")
        path.write_bytes(damaged(whole(kind, rng), rng))
        try:
            rows = read_sources([{"source": str(path)}])
        except UserError as error:
            refused.append((f"{path}:", str(error)))
            continue
        for row in range(len(rows)):
            try:
                assert rows.check(row).origin == rows.origin(row)
                read += 1
            except UserError as error:
                refused.append((f"{rows.origin(row)}: ", str(error)))
    assert not [(place, message) for place, message in refused if not message.startswith(place)]
    return read, len(refused)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_damaged_files_are_read_or_refused_with_the_place(tmp_path, kind):
    read, refused = try_files(tmp_path / "a", kind, 600)
    assert read > 600
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_many_damaged_files_are_read_or_refused_with_the_place(tmp_path, record_figure, kind):
    read, refused = try_files(tmp_path / "a", kind, 10_000)
    record_figure("rows_read", read)
    record_figure("rows_and_files_refused", refused)
    assert read > 10_000
    assert refused > 5_000
