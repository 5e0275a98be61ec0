"""Rows of pairs: two documents that share the prompt, each cut by itself, together in one row of a batch."""

import numpy as np
import pytest
from support.chat_templates import CHATML
from support.pairs import write_pairs

from ftjax.data import pipeline
from ftjax.data.format.example import Document, Row
from ftjax.data.format.formats import check_row
from ftjax.data.tokens import kinds
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.errors import UserError


def document(*tokens, prompt=2):
    return Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def test_a_side_is_cut_by_itself():
    long, short = document(1, 2, 3, 4, 5, 6), document(1, 2, 7)
    for other in (short, document(1, 2, *range(20, 60))):
        example = kinds.cut({"chosen": long, "rejected": other}, 4, "f:1")
        np.testing.assert_array_equal(example.documents[0].tokens, [1, 2, 3, 4])
        np.testing.assert_array_equal(example.documents[0].trained, [False, False, True, True])
    np.testing.assert_array_equal(
        kinds.cut({"chosen": long, "rejected": short}, 4, "f:1").tokens, [1, 2, 3, 4, 1, 2, 7]
    )


def test_a_pair_that_the_cut_makes_equal_or_empty_is_refused_with_its_row_and_what_to_do():
    pair = {"chosen": document(1, 2, 3, 4), "rejected": document(1, 2, 3, 5)}
    assert kinds.cut(pair, 4, "f:1").lengths == (4, 4)
    with pytest.raises(
        UserError, match=r"f:1: chosen and rejected are the same within data.max_length; raise data.max_l"
    ):
        kinds.cut(pair, 3, "f:1")
    with pytest.raises(
        UserError, match=r"f:1: chosen has no token of its answer within data.max_length; raise .*now 2"
    ):
        kinds.cut(pair, 2, "f:1")
    with pytest.raises(UserError, match=r"f:1: rejected has no token of its answer"):
        kinds.cut({"chosen": document(1, 2, 3), "rejected": document(1, 2, 3, 4, prompt=3)}, 3, "f:1")
    with pytest.raises(UserError, match=r"f:1: chosen and rejected are the same; correct or remove the row"):
        kinds.cut({"chosen": document(1, 2, 3), "rejected": document(1, 2, 3)}, 3, "f:1")


def test_the_kind_of_a_row_is_seen_from_its_fields():
    rows = {
        "conversation": {"prompt": "a", "completion": "b"},
        "pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "labeled": {"prompt": "a", "completion": "b", "label": True},
    }
    assert {kind: kinds.kind_of(check_row(fields, "f:1")) for kind, fields in rows.items()} == {
        kind: kind for kind in rows
    }
    assert {ROW_KINDS[kind].documents for kind in rows} == {1, 2}


@pytest.fixture
def pairs(tmp_path, make_tokenizer):
    spec = pipeline.DataSpec("pair", 64, 3, True, "assistant", vocab_size=1000)
    source = [{"source": str(write_pairs(tmp_path / "pairs.jsonl", 40))}]
    loader, report = pipeline.load(source, make_tokenizer(CHATML), spec)
    return loader, report, tmp_path / "pairs.jsonl"


def test_packing_keeps_both_documents_of_a_pair_in_one_row_each_from_position_0(pairs, make_tokenizer):
    loader, report, path = pairs
    assert report["examples"] == report["rows"] == 40  # pairs, not documents
    batch = loader.batch(0)
    assert batch["tokens"].shape == (3, 128)
    for row in range(3):
        segments = batch["segment_ids"][row]
        assert segments.max() % 2 == 0
        assert segments.max() >= 2
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            assert batch["weights"][row][here].any()
    # The documents are those of the row, in order.
    example = loader.examples[7]
    (whole,) = ROW_KINDS["pair"].tokenize(
        Row(loader.examples.parts[0].rows[7].fields, "x"), make_tokenizer(CHATML), None, ""
    )
    assert [document.tokens.tolist() for document in example.documents] == [
        side.tokens.tolist() for side in whole.values()
    ]
    assert example.origin == f"{path}:8"


def test_padding_has_one_pair_to_a_row_and_no_row_is_longer_than_two_documents(pairs):
    loader, _, _ = pairs
    single = type(loader)(loader.examples, 3, 128, False, 0)
    batch = single.batch(0)
    assert set(batch["segment_ids"].max(axis=1)) == {2}
    assert batch["tokens"].shape[1] <= 128
