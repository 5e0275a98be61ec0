"""CSV and TSV, held against pandas, and what is refused in them."""

import csv
import json
import os
import random

import pandas
import pytest

from ftjax.data.read import spans
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.labeling import candidates

CHAT = [{"role": "user", "content": 'Say "hi", then\nstop'}, {"role": "assistant", "content": "hi"}]


def read(path, content=None, **options):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sources([{"source": str(path)}], **options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.csv"


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_whatever_pandas_writes_is_read_as_it_was(tmp_path, suffix, line_end):
    rng = random.Random(1)
    pieces = ["a", ",", '"', "\t", "\n", "\r\n", "é", "🙂", " ", ";", "word", "\\", "'", "\x85", "\u2028"]
    frame = pandas.DataFrame(
        [[f"p{i}" + "".join(rng.choices(pieces, k=8)), "c" + "".join(rng.choices(pieces, k=8)), i] for i in range(400)],
        columns=["prompt", "completion", "number"],
    )
    path = tmp_path / f"a.{suffix}"
    frame.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False, lineterminator=line_end)
    rows = read(path)
    assert [row.fields for row in rows] == frame[["prompt", "completion"]].to_dict("records")
    assert rows[250].fields["completion"] == frame["completion"][250]


def test_rows_have_the_line_on_which_they_begin(path):
    rows = read(path, 'text,id\n"two\nlines",1\n\nplain,2\n"a ""b""",3')
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in (2, 5, 6)]
    assert [row.fields["text"] for row in rows] == ["two\nlines", "plain", 'a "b"']


def test_cells_become_what_the_formats_want(path):
    frame = pandas.DataFrame({"messages": [json.dumps(CHAT)], "tools": [""]})
    frame.to_csv(path, index=False)
    assert [m["content"] for m in read(path)[0].fields["messages"]] == [m["content"] for m in CHAT]

    pandas.DataFrame(
        {"prompt": ["p", "q", "r"], "completion": ["a", "b", "c"], "label": ["true", "FALSE", "1"]}
    ).to_csv(path, index=False)
    assert [row.fields["label"] for row in read(path)] == [True, False, True]
    # Without a completion that would be good or bad, a label is a class.
    pandas.DataFrame({"text": ["p", "q"], "label": ["True", "0"]}).to_csv(path, index=False)
    assert [row.fields["label"] for row in read(path)] == ["True", "0"]

    steps = {"prompt": ["p"], "completions": ['["a", "b"]'], "labels": ["[true, false]"]}
    pandas.DataFrame(steps).to_csv(path, index=False)
    assert read(path)[0].fields["labels"] == [True, False]
    path.write_text('prompt,answers\np,"[""a"", ""b""]"\n')
    (candidate,) = candidates.of_file(str(path))
    assert [turns[0]["content"] for turns in candidate.answers] == ["a", "b"]

    asked = json.dumps([{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "b"}])
    pandas.DataFrame({"messages": [asked], "images": ['["b.png", "c.png"]']}).to_csv(path, index=False)
    (row,) = read(path)
    assert [os.path.basename(image) for image in row.fields["messages"][0]["images"]] == ["b.png", "c.png"]

    frame = pandas.DataFrame(
        {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"], "margin": [0.5, None]}
    )
    frame.to_csv(path, index=False)
    assert [row.fields.get("margin") for row in read(path)] == [0.5, None]
    frame["margin"] = ["0.5", "much"]
    frame.to_csv(path, index=False)
    with pytest.raises(UserError, match=r"a.csv:3: margin is 'much', not a number"):
        list(read(path))


def test_an_answer_that_is_json_stays_text(path):
    answers = ['[{"name": "x"}]', "[1, 2]", "[not json", "[]", '{"role_of": 1}', "[[1]]"]
    pandas.DataFrame({"prompt": ["p"] * len(answers), "completion": answers}).to_csv(path, index=False)
    assert [row.fields["completion"] for row in read(path)] == answers


BAD_ROWS = {
    "too few cells": (b"only one\n", "has 1 cells, and the header 2 .prompt, completion.; quote"),
    "too many cells": (b"a,b,c\n", "has 3 cells"),
    "not UTF-8": (b"caf\xe9,b\n", r"not UTF-8 at byte 3 of the row \(0xE9.*'é'.*Excel as 'CSV UTF-8', or .*iconv"),
    "empty": (b"a,\n", "completion is empty"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_with_file_and_line_or_skipped_on_demand(path, line, message):
    content = b"prompt,completion\n1,2\n" + line + b"3,4\n"
    with pytest.raises(UserError, match=f"^{path}:3: {message}"):
        list(read(path, content))
    assert [row.origin for row in read(path, max_bad_rows=1)] == [f"{path}:2", f"{path}:4"]


def test_a_giant_row_is_a_bad_row_and_a_long_one_is_read(path, monkeypatch):
    long = "x" * 200_000  # above what the csv module allows by default
    rows = read(path, f"text\n{long}\n")
    csv.field_size_limit(131072)  # as in a process that has not opened the file itself
    assert rows[0].fields["text"] == long
    monkeypatch.setattr(spans, "MAX_ROW_BYTES", 2**20)
    with pytest.raises(UserError, match=r"a.csv:\d: .*(1 MiB|field larger)"):
        list(read(path, "text\n" + "x" * 2**22 + "\n"))


BAD_FILES = {
    "empty": ("", ": the file has no rows"),
    "header only": ("text\n", ": the file has no rows"),
    "a name twice": ("text,text\na,b\n", ":1: two columns are called 'text'"),
    "no name": (";;\na;b;c\n", ":1: no column has a name"),
    "header not UTF-8": (b"caf\xe9,text\na,b\n", r":1: the header is not UTF-8 \(0xE9, .*'é'.*iconv -f WINDOWS-1252"),
    "only blank lines": ("\n\r\n", ": the file has no rows"),
    "open quote in the header": ('"text\na\nb\n', ":1: not well-formed CSV in the record that starts here"),
    "open quote": ('text\na\n"b\nc\n', ":3: not well-formed CSV in the record that starts here .*unexpected end"),
    "text after a quote": ('text\n"b"c\n', ":2: not well-formed CSV"),
    "old line ends": ("text\ra\rb\r", ":1: a line ends in a carriage return alone; save"),
    "UTF-16 without a mark": ("text\na\n".encode("utf-16-be"), ":1: looks like UTF-16"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_when_they_are_opened(path, content, message):
    with pytest.raises(UserError, match=f"^{path}{message}"):
        read(path, content, max_bad_rows=10)


QA = [{"prompt": 'Was, "bitte"?', "completion": "Nichts; danke\tsehr"}, {"prompt": "p", "completion": "c | d"}]


def written(**options):
    return pandas.DataFrame(QA).to_csv(index=False, **options)


# What Excel, pandas and others write -> the content of a file with the rows QA.
ODD = {
    "semicolons": written(sep=";"),
    "tabs": written(sep="\t"),
    "bars": written(sep="|"),
    "all in quotes": written(sep=";", quoting=csv.QUOTE_ALL),
    "a separator in the quotes of the header": written()
    .replace("prompt,", '"a;b;c;d",prompt,')
    .replace("\n", "\n1,", 1)
    .replace("\np,", "\n2,p,"),
    "a byte order mark": "\ufeff" + written(),
    "UTF-16, as Excel's Unicode text": written(sep="\t", lineterminator="\r\n").encode("utf-16"),
    "the other UTF-16": ("\ufeff" + written()).encode("utf-16-be"),
    "Windows' line ends": written(sep=";", lineterminator="\r\n"),
    "empty lines around": "\n" + written() + "\n\r\n\n",
    "an index without a name": pandas.DataFrame(QA).to_csv(),
    "empty columns at the end": written(sep=";").replace("\n", ";;\n"),
    "a line that names the separator": "sep=;\r\n" + written(sep=";"),
    "no line end": written().rstrip("\n"),
}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_odd_files_are_read_as_they_are_meant(tmp_path, content, suffix):
    rows = read(tmp_path / f"a.{suffix}", content)
    assert [row.fields for row in rows] == QA
    first = 3 if content[:1] == "\n" or content[:4] == "sep=" else 2
    assert [row.origin for row in rows] == [f"{tmp_path}/a.{suffix}:{line}" for line in (first, first + 1)]


def test_an_index_without_a_name_is_said_once_and_other_columns_without_one_must_be_empty(path, caplog):
    path.write_text(pandas.DataFrame(QA).to_csv())
    for _ in range(2):
        read(path)
    assert [record.message.removeprefix(str(path)) for record in caplog.records] == [
        ": the first column has no name and is left out, as an index that pandas wrote"
    ]
    with pytest.raises(UserError, match=r"a.csv:3: cell 3 stands in a column without a name; .*quote cells"):
        list(read(path, "prompt,completion,\np,c,\nHello, you,c\n"))


def test_one_column_is_a_file_of_texts_whatever_stands_in_it(path):
    assert [row.fields["text"] for row in read(path, 'text\na; b\n"c, d"\ne|f\n')] == ["a; b", "c, d", "e|f"]


def test_a_missing_header_shows_in_the_message(path):
    with pytest.raises(UserError, match=r"a\.csv:2: .*columns Hi, Hello look like .* if they are names of"):
        list(read(path, "Hi,Hello\nHo,Hullo\n"))


def test_a_name_twice_in_a_cell_of_json_is_refused(path):
    cell = '"[{""role"": ""user"", ""content"": ""a"", ""content"": ""b""}]"'
    with pytest.raises(UserError, match=r"a.csv:2: two members are called 'content'; keep one"):
        list(read(path, f"messages\n{cell}\n"))


def test_an_empty_label_is_refused_unless_the_format_is_named(path):
    content = "prompt,completion,label\nq,a,true\nq,a,\n"
    with pytest.raises(UserError, match=r"a.csv:3: label is empty; write true or false"):
        list(read(path, content))
    rows = read_sources([{"source": str(path), "format": "prompt_completion"}])
    assert rows[1].fields == {"prompt": "q", "completion": "a"}
