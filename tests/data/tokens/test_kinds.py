"""Rows of pairs: two documents that share the prompt, each cut by itself, together in one row of a batch."""

import json

import numpy as np
import pytest
from support.chat_templates import CHATML
from support.pairs import write_pairs

from ftjax.data import pipeline
from ftjax.data.format.example import Document, Row
from ftjax.data.format.formats import check_row
from ftjax.data.tokens import kinds, tokenize
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


def test_a_pair_is_cut_alike_whatever_other_pairs_there_are(tmp_path, make_tokenizer):
    """Neither a longer prompt nor a longer answer elsewhere takes anything of a pair's own budget."""
    pair = {"prompt": "a", "chosen": "b " * 40, "rejected": "c"}
    longer = {"prompt": "a " * 4, "chosen": "b", "rejected": "c " * 90}
    found = []
    for number, rows in enumerate([[pair], [pair, longer], [longer, pair]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = pipeline.DataSpec("pair", 32, 3, True, "assistant", vocab_size=1000)
        loader, _ = pipeline.load([{"source": str(path)}], make_tokenizer(CHATML), spec)
        found.append(loader.examples[rows.index(pair)].documents)
    assert [len(document.tokens) for document in found[0]] == [32, len(found[0][1].tokens)]
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.trained, theirs.trained)


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


@pytest.mark.parametrize("cached", [False, True])
def test_what_rows_say_of_their_documents_stands_at_each_token_and_decides_the_fingerprint(
    tmp_path, make_tokenizer, cached, monkeypatch
):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenize, "MANY_ROWS", 1 if cached else 1000)
    monkeypatch.setattr(tokenize, "MAX_WORKERS", 0)

    def loader_of(kind, *rows):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = pipeline.DataSpec(kind, 24, 1, True, "assistant", vocab_size=1000, chosen_length=96)
        loader, _ = pipeline.load([{"source": str(path)}], make_tokenizer(CHATML), spec)
        assert len(list((tmp_path / "cache").rglob("*/cache.json"))) == cached * (len(list(tmp_path.iterdir())) - 1)
        return loader

    def answer(label, completion="b"):
        return {"prompt": "a", "completion": completion, "label": label}

    # The second is cut, which leaves its label.
    labeled = loader_of("labeled", answer(True), answer(False, "b " * 99))
    batch = labeled.batch(0)
    by_document = {
        (float(batch["labels"][0][batch["segment_ids"][0] == segment].min()), length)
        for segment in (1, 2)
        for length in [int((batch["segment_ids"][0] == segment).sum())]
    }
    assert {label for label, _ in by_document} == {1.0, -1.0}
    assert (-1.0, 24) in by_document
    assert not batch["labels"][0][batch["segment_ids"][0] == 0].any()
    other = loader_of("labeled", answer(False), answer(False, "b " * 99))
    assert other.fingerprint() != labeled.fingerprint()

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    batch = loader_of("ranked", pair | {"margin": 2.5}).batch(0)
    assert set(batch["labels"][0][batch["segment_ids"][0] > 0]) == {2.5}
    soft = loader_of("ranked", pair | {"probability": 0.75}).batch(0)
    assert [soft["labels"][0][soft["segment_ids"][0] == segment].max() for segment in (1, 2)] == [0.0, -0.25]
    assert "labels" not in loader_of("pair", pair | {"margin": 2.5}).batch(0)


def test_a_step_is_labeled_where_it_ends_and_steps_beyond_the_cut_fall_away(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    steps = ["4 + 1 is 5.", "4 + 1 is 5.", "So 6."]  # the same twice: no search would tell them apart
    row = Row({"prompt": "What is 2 + 3?\n4 + 1 is 5.\n", "completions": steps, "labels": [True, False, True]}, "f:1")
    (documents,) = ROW_KINDS["stepwise"].tokenize(row, tokenizer, None, "")
    (document,) = documents.values()
    places = np.flatnonzero(document.labels)
    np.testing.assert_array_equal(document.labels[places], [1, -1, 1])
    np.testing.assert_array_equal(np.flatnonzero(document.trained), places)
    assert tokenizer.decode(document.tokens[places[:2]]) == "\n\n"
    assert document.tokens[places[2]] == tokenizer.eos_token_id
    answer = tokenizer.decode(document.tokens[: places[1] + 1]).rpartition("assistant\n")[2]
    assert answer == "4 + 1 is 5.\n4 + 1 is 5.\n"
    assert np.flatnonzero(kinds.cut(documents, places[1] + 1, "f:1").labels).tolist() == places[:2].tolist()
    assert not kinds.cut(documents, places[0], "f:1").trained.any()
    # Another separator, of several tokens.
    (documents,) = ROW_KINDS["stepwise"].tokenize(row, tokenizer, None, "", kinds.Settings(step_separator=" => "))
    (document,) = documents.values()
    ends = np.flatnonzero(document.labels)
    assert tokenizer.decode(document.tokens[: ends[0] + 1]).endswith("assistant\n4 + 1 is 5. => ")


def test_steps_that_the_tokenizer_merges_are_refused(make_tokenizer):
    row = Row({"prompt": "Hi", "completions": ["Fir", "t so"], "labels": [True, False]}, "f:1")
    with pytest.raises(UserError, match=r"f:1: the tokenizer merges the end of completions\[0\] with the next one"):
        ROW_KINDS["stepwise"].tokenize(row, make_tokenizer(CHATML), None, "", kinds.Settings(step_separator="s"))


def test_a_class_is_a_name_or_an_index_and_another_is_refused_with_its_row(make_tokenizer):
    tokenizer, settings = make_tokenizer(CHATML), kinds.Settings(classes=("ham", "spam"))

    def classified(**fields):
        (documents,) = ROW_KINDS["classified"].tokenize(check_row(fields, "f:7"), tokenizer, None, "", settings)
        ((name, document),) = documents.items()
        return name, set(document.labels), tokenizer.decode(document.tokens)

    assert classified(text="a b", label="spam") == ("spam", {1}, "a b<|im_end|>")
    assert classified(text="a b", label=0) == ("ham", {0}, "a b<|im_end|>")
    # True is the class 1, unless a class is called so, whichever stands first.
    assert [classified(text="a", label=label)[0] for label in (True, "True", "FALSE")] == ["spam", "spam", "ham"]
    settings = kinds.Settings(classes=("True", "False"))
    assert [classified(text="a", label=label)[0] for label in (True, False, 0)] == ["True", "False", "True"]
    settings = kinds.Settings(classes=("1", "0"))
    assert [classified(text="a", label=label)[0] for label in (True, False, 0)] == ["1", "0", "0"]
    settings = kinds.Settings(classes=("ham", "spam"))
    name, _, text = classified(messages=[{"role": "user", "content": "Hi"}], label="ham")
    assert name == "ham"
    assert text.endswith("user\nHi<|im_end|>\n")
    for label, message in (("spm", "label is 'spm', .*did you mean 'spam'"), (2, "label is '2', which is no name")):
        with pytest.raises(UserError, match=f"^f:7: {message}"):
            classified(text="a", label=label)
    with pytest.raises(UserError, match="f:7: has no class"):
        classified(prompt="a", completion="b", label=True)
    # Supervised tuning does not learn answers that a label may call bad, and learns texts whatever their class.
    with pytest.raises(UserError, match="f:7: is an answer with a label"):
        ROW_KINDS["conversation"].tokenize(
            Row({"prompt": "a", "completion": "b", "label": "bad"}, "f:7"), tokenizer, None, "assistant"
        )
    ((document,),) = (
        d.values()
        for d in ROW_KINDS["conversation"].tokenize(Row({"text": "a", "label": 1}, "f:7"), tokenizer, None, "assistant")
    )
    assert document.labels is None
    with pytest.raises(UserError, match="f:7: label is 'bad'; this needs"):
        ROW_KINDS["labeled"].tokenize(
            Row({"prompt": "a", "completion": "b", "label": "bad"}, "f:7"), tokenizer, None, ""
        )
