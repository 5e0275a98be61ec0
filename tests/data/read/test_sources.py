"""From entries of a config to batches: the same rows in every kind of file give the same tokens."""

import json

import fsspec
import numpy as np
import pandas
import pytest
import zstandard

from ftjax.data import pipeline
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

CHATS = [
    [{"role": "user", "content": f"What is {i}, é?"}, {"role": "assistant", "content": f'It is "{i}",\nmostly.'}]
    for i in range(40)
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The name of a source -> the source; each holds the same conversations."""
    place = tmp_path_factory.mktemp("sources")
    rows = [{"messages": messages} for messages in CHATS]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (place / "a.jsonl").write_bytes(lines)
    (place / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (place / "a.json").write_text(json.dumps({"data": rows}, indent=1))
    pandas.DataFrame(rows).to_parquet(place / "a.parquet")
    pandas.DataFrame({"messages": [json.dumps(messages) for messages in CHATS]}).to_csv(place / "a.csv", index=False)
    system = fsspec.filesystem("memory")
    system.pipe("/sources/a.jsonl", lines)
    yield {path.name: str(path) for path in place.iterdir()} | {"a URL": "memory://sources/a.jsonl"}
    system.rm("/sources", recursive=True)


def batch(entries, tokenizer, **options):
    spec = pipeline.DataSpec("conversation", 64, 8, False, "assistant", vocab_size=len(tokenizer), seed=1, **options)
    loader, report = pipeline.load(entries, tokenizer, spec)
    return loader.batch(3), report


def test_the_same_rows_give_the_same_batches_whatever_holds_them(sources, chatml):
    wanted, report = batch([{"source": sources["a.jsonl"]}], chatml)
    assert report["rows"] == 40
    assert sum(array.sum() for array in wanted.values()) > 0
    for source in sources.values():
        found, _ = batch([{"source": source}], chatml)
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{source}: {name}")


def test_a_mixture_counts_its_sources_with_their_splits(sources):
    entries = [
        {"source": sources["a.csv"], "split": "train[:25%]"},
        {"source": sources["a.parquet"], "limit": 7, "weight": 2.0},
        {"source": "task:support_ticket", "split": "train[-3:]"},
    ]
    rows = read_sources(entries)
    assert rows.per_source == [
        (f"{sources['a.csv']} train[:25%]", 10),
        (sources["a.parquet"], 7),
        ("task:support_ticket train[-3:]", 3),
    ]
    assert rows.weights([1, 1, 1]) == [1.0, 2.0, 1.0]
    assert len(list(rows)) == 20


def test_the_hold_out_puts_a_prompt_on_one_side_in_all_sources(sources):
    entries = [{"source": source} for source in sources.values()]
    sides = [
        [{row.fields["messages"][0]["content"] for row in read_sources([entry], 0, 0.3, side)} for entry in entries]
        for side in (False, True)
    ]
    for kept, held in zip(*sides, strict=True):
        assert kept == sides[0][0]
        assert held == sides[1][0]
        assert not kept & held
        assert len(kept | held) == 40


def test_a_task_has_its_splits_and_its_rows_are_named(chatml):
    rows = read_sources([{"source": "task:support_ticket"}])
    assert rows[3].origin == "task:support_ticket[3]"
    assert rows.digest() == read_sources([{"source": "task:support_ticket"}]).digest()
    assert rows.digest() != read_sources([{"source": "task:support_ticket", "split": "test"}]).digest()
    with pytest.raises(UserError, match=r"splits train and test, not 'dev'"):
        read_sources([{"source": "task:support_ticket", "split": "dev"}])
    with pytest.raises(UserError, match=r"task:suport_ticket: no such task; did you mean 'support_ticket'"):
        read_sources([{"source": "task:suport_ticket"}])
