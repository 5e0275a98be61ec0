"""Columns under other names: in every kind of source, checked, part of the digest, and guessed where nothing fits."""

import json
import pickle

import pandas
import pytest
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.data.format import guess
from ftjax.data.format.formats import check_row, detect
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

COLUMNS = {"prompt": "question", "completion": "answer"}
ROWS = [{"question": f"q {i}", "answer": f"a {i}", "prompt": "not meant", "n": i} for i in range(3)]
WANTED = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(3)]


def written(place, kind, rows):
    path, frame = place / f"a.{kind}", pandas.DataFrame(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps({"data": rows}))
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame = frame.map(lambda cell: cell if isinstance(cell, str) else json.dumps(cell))
        frame.to_csv(path, index=False)
    elif kind == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(place / "a.hf")
    return f"hf:{path}" if kind == "hf" else str(path)


def read(source, columns=COLUMNS, **options):
    return read_sources([{"source": source, "columns": columns, **options}])


KINDS = ("jsonl", "json", "csv", "parquet", "hf")


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_renamed_in_every_kind_of_source(tmp_path, kind):
    source = written(tmp_path, kind, ROWS)
    rows = read(source)
    assert [row.fields for row in rows] == WANTED
    assert [row.fields for row in pickle.loads(pickle.dumps(rows))] == WANTED
    assert rows.digest() != read_sources([{"source": source}]).digest()
    assert rows.digest() != read(source, {"prompt": "answer", "completion": "question"}).digest()
    with pytest.raises(UserError, match=r"no column 'quesion', which the option columns = .*did you mean 'question'"):
        read(source, {"prompt": "quesion", "completion": "answer"})


@pytest.mark.parametrize("kind", KINDS)
def test_cells_become_what_the_formats_want_under_our_names(tmp_path, kind):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = read(written(tmp_path, kind, [{"chat": chat}, {"chat": chat}]), {"messages": "chat"})
    assert [row.fields["messages"] for row in rows] == [chat, chat]
    pairs = [{"q": "q", "good": "a", "bad": "b", "gap": 0.5}]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "gap"}
    assert (
        read(written(tmp_path / "..", kind, pairs) if kind != "hf" else written(tmp_path / "b", kind, pairs), columns)[
            0
        ].fields["margin"]
        == 0.5
    )


def test_a_column_that_some_rows_lack_is_one_that_they_lack(tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "persona": "Be brief."}]
    found = read(written(tmp_path, "jsonl", rows), COLUMNS | {"system": "persona"})
    assert [len(row.fields.get("messages", ())) for row in found] == [0, 3]


def test_names_that_no_format_has_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"names 'promt', which no format has .*did you mean 'prompt'"):
        read(written(tmp_path, "jsonl", ROWS), {"promt": "question"})


def test_the_option_is_checked_in_the_config():
    config = ConfigDict({"data": {"train": ({"source": "a.csv", "columns": COLUMNS},)}})
    assert json.dumps(configs.sources(config, "train")) == json.dumps([{"source": "a.csv", "columns": COLUMNS}])
    for wrong in ("question", {}, {"prompt": 3}, ["prompt"]):
        with pytest.raises(UserError, match=r"'columns' of entry .* must be a mapping from our names to the source's"):
            configs.source_entry({"source": "a.csv", "columns": wrong}, "data.train")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
GUESSED = [
    ({"question": "q", "answer": "a"}, COLUMNS),
    ({"Question": "q", "Answer": "a", "id": 3}, {"prompt": "Question", "completion": "Answer"}),
    ({"input": "q", "output": "a"}, {"prompt": "input", "completion": "output"}),
    ({"instruction": "q", "response": "a"}, {"prompt": "instruction", "completion": "response"}),
    ({"instruction": "q", "input": "i", "response": "a"}, {"output": "response"}),
    ({"query": "q", "response": "a"}, {"prompt": "query", "completion": "response"}),
    ({"user": "q", "assistant": "a"}, {"prompt": "user", "completion": "assistant"}),
    ({"prompt": "q", "response": "a"}, {"completion": "response"}),
    ({"question": "q", "chosen_response": "a", "rejected_response": "b"},
     {"prompt": "question", "chosen": "chosen_response", "rejected": "rejected_response"}),
    ({"chat": CHAT, "id": "x"}, {"messages": "chat"}),
    ({"dialog": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"conversations": "dialog"}),
    ({"content": "Once."}, {"text": "content"}),
    ({"Frage": "q", "Antwort": "a"}, {"prompt": "Frage", "completion": "Antwort"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "columns"), GUESSED)
def test_usual_names_are_guessed_and_the_guess_fits(tmp_path, fields, columns):
    with pytest.raises(UserError, match="look like") as caught:
        check_row(fields, "a.jsonl:1")
    assert f"write --config.data.train=\"{{'source': 'a.jsonl', 'columns': {columns}}}\"" in str(caught.value)
    source = written(tmp_path, "jsonl", [fields])
    assert read(source, columns)[0].fields


def test_nothing_is_guessed_from_names_that_say_too_little():
    for fields in (
        {"text": "a", "label": 1},
        {"a": "x", "b": "y", "c": "z"},
        {"question": "q"},
        {"question": "q", "answer": 3},
    ):
        assert guess.columns(fields) == {}
    assert detect({"question": "q", "answer": "a"}) == []
