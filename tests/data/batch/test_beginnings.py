"""What the documents of a row begin with alike is there once, and every document is there whole."""

import dataclasses

import numpy as np
import pytest
from support.tokenized import examples_of

from ftjax.data.batch import beginnings, packing
from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Document, Example
from ftjax.data.tokens.examples import join


def document(*tokens, prompt):
    return Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def conversations(rng, count, system=5, source=0):
    """Their system message, a prompt, an answer that is trained."""
    made = []
    for i in range(count):
        prompt, answer = rng.integers(100, 999, rng.integers(1, 8)), rng.integers(100, 999, rng.integers(2, 9))
        tokens = np.array([*range(1, system + 1), *prompt, *answer], np.int32)
        trained = np.arange(len(tokens)) >= system + len(prompt)
        made.append(Example(tokens, trained, f"{source}:{i}"))
    return made


def pairs(rng, count, system=5):
    """Two answers to each prompt, which may begin alike."""
    made = []
    for i in range(count):
        prompt = [*range(1, system + 1), *rng.integers(100, 999, rng.integers(1, 8))]
        sides = []
        for _ in range(2):
            answer = rng.integers(100, 102, rng.integers(2, 9))
            sides.append(document(*prompt, *answer, prompt=len(prompt)))
        made.append(Example.of(sides, f"0:{i}"))
    return made


def read_back(batch):
    """[(tokens, trained)] of the documents of each row, put together from what those before them have."""
    rows = []
    for row in range(len(batch["tokens"])):
        of_row, before = [], []
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            positions = batch["positions"][row, places]
            begin = int(positions[0])
            assert (positions == np.arange(begin, begin + len(places))).all()
            assert begin <= len(before)
            before = [*before[:begin], *places]
            weights = [0.0, *batch["weights"][row, before[:-1]]]
            weights[begin] = 0.0 if begin else weights[begin]  # what comes before it predicts another's token
            targets = batch["targets"][row, before]
            assert (targets[begin:-1] == batch["tokens"][row, before[begin + 1 :]]).all()
            assert targets[-1] == 0
            of_row.append((batch["tokens"][row, before], np.array(weights) != 0))
        rows.append(of_row)
    return rows


@pytest.mark.parametrize("make", [conversations, pairs])
@pytest.mark.parametrize("seed", range(3))
def test_every_document_is_in_an_epoch_once_and_whole(make, seed):
    examples = examples_of(make(np.random.default_rng(seed), 40))
    loader = Loader(examples, 4, 64, True, seed, shares=True)
    batches = [loader.batch(i) for i in range(loader.batches_in(1.0))]
    found = [one for batch in batches for row in read_back(batch) for one in row]
    extra = sum(len(loader.batch_examples(i)) for i in range(len(batches))) - len(examples)  # of the next epoch
    wanted = [one for i in range(len(examples)) for one in examples.documents_of(i)]

    def keys(documents):
        return sorted((tokens.tobytes(), trained.tobytes()) for tokens, trained, *_ in documents)

    of_each = examples.document_lengths.shape[1]
    assert len(found) == len(wanted) + extra * of_each
    assert set(keys(found)) == set(keys(wanted))
    evaluated = [one for batch in loader.eval_batches() for row in read_back(batch) for one in row]
    assert keys(evaluated) == keys(wanted)


@pytest.mark.parametrize("make", [conversations, pairs])
def test_what_is_alike_is_what_one_document_after_the_other_says(make):
    examples = examples_of(make(np.random.default_rng(7), 30))
    found = beginnings.of(examples)
    documents = [examples.documents_of(i) for i in range(len(examples))]
    assert found.prefix == min(beginnings.alike(one, documents[0][0]) for of_one in documents for one in of_one) == 5
    for i, (first, *others) in enumerate(documents):
        within = [beginnings.alike(other, first) for other in others]
        assert found.begins[i].tolist() == [5, *within]
        assert found.sizes[i] == sum(len(one.tokens) for one in documents[i]) - 5 - sum(within)


def test_no_token_is_shared_that_predicts_a_trained_one_or_leaves_a_document_less_than_two():
    answered = document(1, 2, 3, 4, 9, 8, prompt=4)
    assert beginnings.alike(answered, document(1, 2, 3, 4, 9, 7, prompt=4)) == 3  # token 3 predicts the answer
    assert beginnings.alike(answered, document(1, 2, 3, 4, 9, 7, prompt=2)) == 2  # of which the other trains two more
    assert beginnings.alike(document(1, 2, 3, 9, prompt=4), document(1, 2, 3, 9, prompt=4)) == 2
    assert beginnings.alike(document(1, 2, 3, prompt=1), document(1, 2, 3, prompt=1)) == 0
    assert beginnings.alike(document(1, 2, 3, 4, 5, prompt=5), document(1, 2, prompt=2)) == 2


def test_a_row_holds_the_prefix_once_and_so_more_examples():
    examples = examples_of(conversations(np.random.default_rng(0), 400, system=20))
    alone, shared = (Loader(examples, 4, 96, True, 0, shares=shares) for shares in (False, True))
    assert shared.rows_per_epoch(0) < 0.6 * alone.rows_per_epoch(0)
    for i in range(5):
        batch = shared.batch(i)
        assert shared.batch_tokens(i) == (batch["segment_ids"] > 0).sum()
        assert ((batch["tokens"] == 1).sum(axis=1) == 1).all()  # the first token of the system message
    every = [shared.batch_tokens(i) for i in range(shared.rows_per_epoch(0) // 4)]
    assert shared.packing_efficiency() == pytest.approx(np.mean(every) / (4 * 96), rel=0.02)


def test_sets_of_several_parts_share_what_all_begin_with():
    rng = np.random.default_rng(0)
    both = join([examples_of(conversations(rng, 9, system=6)), examples_of(conversations(rng, 9, system=4, source=1))])
    assert beginnings.of(both).prefix == 4
    other = examples_of([Example(np.array([7, 8, 9], np.int32), np.array([False, False, True]), "2:0")])
    apart = beginnings.of(join([both, other]))
    assert apart.prefix == 0
    assert not apart.begins.any()
    assert apart.sizes.sum() == both.lengths.sum() + 3


def test_what_stands_at_tokens_stands_at_those_of_its_own_document():
    rng = np.random.default_rng(0)
    made, labels = pairs(rng, 6), np.float32([3, -2])
    made = [dataclasses.replace(one, labels=np.repeat(labels * (i + 1), one.lengths)) for i, one in enumerate(made)]
    examples = examples_of(made, source_ids=[0, 1, 0, 1, 0, 1], weights=(1.0, 1.0), replayed=(False, True))
    examples = dataclasses.replace(examples, reference_logps=np.arange(12, dtype=np.float32).reshape(6, 2) + 1)
    row = np.array([4, 1, 0])
    batch = packing.fill(examples, [row], 96, alike=beginnings.of(examples))
    for segment in range(1, 7):
        mine, example, side = batch["segment_ids"][0] == segment, row[(segment - 1) // 2], (segment - 1) % 2
        assert set(batch["labels"][0, mine]) == {labels[side] * (example + 1)}
        assert set(batch["replay"][0, mine]) == {float(example % 2)}
        assert batch["reference_logps"][0, mine][-1] == examples.reference_logps[example, side]
        assert np.count_nonzero(batch["reference_logps"][0, mine]) == 1


def test_another_order_has_another_fingerprint():
    examples = examples_of(conversations(np.random.default_rng(0), 8))
    alone, shared = (Loader(examples, 4, 64, True, 0, shares=shares).fingerprint() for shares in (False, True))
    assert alone != shared


def test_two_hundred_thousand_examples_in_a_second():
    """A loop over documents would take minutes."""
    rng = np.random.default_rng(0)
    examples = examples_of(conversations(rng, 2000, system=200))
    many = dataclasses.replace(
        examples,
        **{name: np.tile(getattr(examples, name), 100) for name in ("starts", "lengths", "rows", "source_ids")},
        document_lengths=np.tile(examples.document_lengths, (100, 1)),
    )
    assert beginnings.of(many).prefix == 200
