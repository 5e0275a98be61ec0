"""Paths of images start at the file of their row, whatever that is."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from ftjax.data.format.images import images_of
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
ROW = {"image": "pictures/a.png", "conversations": TURNS}


def jsonl(folder, name="rows.jsonl"):
    (folder / name).write_text(json.dumps(ROW) + "\n")
    return {"source": str(folder / name)}


def json_list(folder):
    (folder / "rows.json").write_text(json.dumps([ROW]))
    return {"source": str(folder / "rows.json")}


def packed(folder):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    return {"source": str(folder / "rows.jsonl.gz")}


def several(folder):
    for name in "ab":
        jsonl(folder, f"{name}.jsonl")
    return {"source": str(folder / "*.jsonl")}


def named(folder):
    (folder / "rows.jsonl").write_text(json.dumps({"photo": ROW["image"], "conversations": TURNS}) + "\n")
    return {"source": str(folder / "rows.jsonl"), "columns": {"image": "photo"}}


def table_of_text(folder):
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "conversations"], [ROW["image"], json.dumps(TURNS)]])
    return {"source": str(folder / "rows.csv")}


def parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), folder / "rows.parquet")
    return {"source": str(folder / "rows.parquet")}


@pytest.mark.parametrize("write", [jsonl, json_list, packed, several, named, table_of_text, parquet])
def test_a_relative_path_starts_at_the_file_of_the_row(tmp_path, monkeypatch, write):
    entry = write(tmp_path)
    for row in read_sources([entry]):
        assert images_of(row.fields) == [f"{tmp_path}/./pictures/a.png"]
    monkeypatch.chdir(tmp_path)  # where the source is named by a relative path, too
    rows = read_sources([entry | {"source": entry["source"].rpartition("/")[2]}])
    assert images_of(rows[0].fields) == [f"{tmp_path}/./pictures/a.png"]


def test_a_directory_of_a_data_set_is_where_its_paths_start(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW]).save_to_disk(tmp_path / "set")
    rows = read_sources([{"source": f"hf:{tmp_path / 'set'}"}])
    assert images_of(rows[0].fields) == [f"{tmp_path}/set/./pictures/a.png"]


def test_rows_of_no_file_have_whole_paths(monkeypatch):
    from ftjax.data.read import sources

    monkeypatch.setattr(sources.registry, "get", lambda name: name)
    monkeypatch.setattr(sources.registry, "examples", lambda task, split: [ROW])
    with pytest.raises(UserError, match=r"task:seeing\[0\]: the path of the image pictures/a.png is relative"):
        read_sources([{"source": "task:seeing"}])[0]
