"""Texts longer than a document: they go on in further ones, and nothing of them is lost or learned twice."""

import dataclasses
import json

import numpy as np
import pytest

from ftjax import config as configs
from ftjax import config_changes
from ftjax.data import pipeline
from ftjax.data.audit.checks import RowsOf, TokenFacts, at_start
from ftjax.data.format.example import Document
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import kinds
from ftjax.data.tokens.tokenize import tokenize

L = 32


@pytest.fixture
def source(tmp_path):
    """Texts of many lengths around those where another document begins, and a long conversation."""
    rng = np.random.default_rng(0)
    words = ["lamp", "order", "Anna", "is", "broken", "blue"]
    texts = [" ".join(rng.choice(words, n)) for n in (1, 2, *range(25, 40), 60, 61, 62, 63, 200, 500)]
    chat = [{"role": "user", "content": "lamp " * 60}, {"role": "assistant", "content": "It is blue. " * 60}]
    rows = [{"text": text} for text in texts] + [{"messages": chat}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(tmp_path / "rows.jsonl")}


def test_every_token_but_the_first_is_predicted_once_and_in_its_order(source, chatml):
    rows = read_sources([source | {"split": "train[:-1]"}])
    examples = tokenize(rows, chatml, L)
    for i in range(len(rows)):
        whole = [*chatml(rows[i].fields["text"])["input_ids"], chatml.eos_token_id]
        mine = [examples[k] for k in np.flatnonzero(examples.rows == i)]
        assert len(mine) == max(1, -(-(len(whole) - 1) // (L - 1)))
        assert [len(one.tokens) for one in mine[:-1]] == [L] * (len(mine) - 1)
        assert all(not one.trained[0] and one.trained[1:].all() for one in mine)
        assert [int(mine[0].tokens[0]), *(t for one in mine for t in one.tokens[one.trained].tolist())] == whole
        assert {one.origin for one in mine} == {rows.origin(i)}
    report = examples.report
    assert (report["truncated"], report["dropped"]) == (0, 0)
    assert report["divided"] == sum(np.unique(examples.rows, return_counts=True)[1] > 1) > 5
    wanted = sum(len(chatml(row.fields["text"])["input_ids"]) for row in rows)  # the end token for the first of each
    assert report["trained_tokens"] == wanted


def test_conversations_are_still_cut_and_so_are_texts_where_it_is_asked_for(source, chatml):
    rows = read_sources([source])
    divided, cut = (tokenize(rows, chatml, 200, long_text=how) for how in ("divide", "cut"))
    assert (divided.report["divided"], divided.report["truncated"]) == (2, 1)
    assert (cut.report["divided"], cut.report["truncated"], cut.report["examples"]) == (0, 3, len(rows))
    assert len(divided[len(divided) - 1].tokens) == 200
    assert divided.digest != cut.digest
    with pytest.raises(ValueError, match="too many values"):  # only a text is one document that may go on
        kinds.divide({"chosen": Document([1], [True]), "rejected": Document([1], [True])}, 8, "f:1")


@pytest.mark.parametrize("packing", [True, False])
def test_positions_and_segments_restart_and_a_batch_depends_on_its_number_alone(source, chatml, packing):
    spec = pipeline.DataSpec("conversation", L, 4, packing, "assistant", vocab_size=len(chatml))
    loader, report = pipeline.load([source | {"split": "train[:-1]"}], chatml, spec)
    assert loader.rows_per_epoch(0) == len(loader.examples) if not packing else report["examples"] > report["rows"]
    trained = 0
    for index in range(loader.batches_in(1)):
        batch = loader.batch(index)
        for segments, positions in zip(batch["segment_ids"], batch["positions"]):
            for segment in range(1, segments.max() + 1):
                np.testing.assert_array_equal(positions[segments == segment], np.arange((segments == segment).sum()))
        trained += batch["weights"].sum()
    again, _ = pipeline.load([source | {"split": "train[:-1]"}], chatml, spec)
    np.testing.assert_array_equal(again.batch(3)["tokens"], loader.batch(3)["tokens"])
    if not loader.rows_per_epoch(0) % 4:
        assert trained == report["trained_tokens"]
    cut, _ = pipeline.load([source], chatml, dataclasses.replace(spec, long_text="cut"))
    assert loader.fingerprint() != cut.fingerprint()


def test_the_checks_see_a_divided_text_once(source, chatml):
    examples = tokenize(read_sources([source | {"split": "train[:-1]"}]), chatml, L)
    assert len(RowsOf(examples)) == examples.report["rows"] < len(examples)
    assert at_start(examples, [], TokenFacts.of(chatml, [chatml.eos_token_id], L)) == []


def test_a_run_that_is_older_than_the_key_cut_its_texts(tmp_path):
    config = configs.defaults()
    config.model.source, config.data.train = "m", ("a.jsonl",)
    configs.write(config, tmp_path / "config.json")
    assert configs.read(tmp_path / "config.json").data.long_text == "divide"
    older = json.loads((tmp_path / "config.json").read_text())
    del older["data"]["long_text"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    read = configs.read(tmp_path / "config.json")
    assert read.data.long_text == "cut"
    assert config_changes.changes(read, config) == []
