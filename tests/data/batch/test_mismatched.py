"""Completions under prompts of other rows: never their own prompt, the batch's own completions, the same everywhere."""

from collections import Counter

import numpy as np
import pytest
from support.tokenized import examples_of

from ftjax.data.batch import mismatched
from ftjax.data.batch.loader import Loader
from ftjax.data.batch.mismatched import PREFIX, Prompts
from ftjax.data.format.example import Example

T = 64


def labeled(prompts, seed=0, completions=(2, 12)):
    """An example for each of the given numbers of prompts: a prompt of 2 to 9 tokens, and a completion of its own."""
    rng = np.random.default_rng(seed)
    made = []
    for i, prompt in enumerate(prompts):
        before = 2 + prompt % 8
        tokens = np.concatenate([np.full(before, 1 + prompt), np.full(rng.integers(*completions), 1000 + i)])
        trained = np.arange(len(tokens)) >= before
        made.append(Example(tokens.astype(np.int32), trained, f"f:{i}", labels=np.full(len(tokens), 1.0, np.float32)))
    return made


def loader_of(prompts, batch_size, packing=True, longest=T, **more):
    return Loader(examples_of(labeled(prompts)), batch_size, T, packing, seed=3, mismatched=longest, **more)


def documents(batch, prefix=""):
    """[(prompt, completion)] of the documents of a batch: the numbers of `labeled`."""
    found = []
    for b in range(len(batch["tokens"])):
        segments = batch[f"{prefix}segment_ids"][b]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            tokens, targets, weights, positions = (
                batch[f"{prefix}{name}"][b, here] for name in ("tokens", "targets", "weights", "positions")
            )
            before = int((tokens < 1000).sum())
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            assert len(set(tokens[:before])) == len(set(tokens[before:])) == 1  # a whole prompt, then a completion
            assert before == 2 + (tokens[0] - 1) % 8
            assert positions.tolist() == list(range(len(tokens)))
            assert targets.tolist() == [*tokens[1:], 0]
            assert weights.tolist() == [0] * (before - 1) + [1] * (len(tokens) - before) + [0]
            found.append((int(tokens[0] - 1), int(tokens[-1] - 1000)))
    return found


def test_a_completion_never_meets_its_own_prompt_in_odd_batches_too():
    rng = np.random.default_rng(0)
    for count in range(1, 40):
        for kinds in {1, 2, 3, count}:
            prompts = rng.integers(0, kinds, count)
            of = Prompts.of(examples_of(labeled(prompts)))
            chosen = rng.permutation(count)
            partner = mismatched.partners(of, chosen)
            if len(set(prompts)) == 1:
                assert (partner == -1).all()
                continue
            assert (prompts[partner] != prompts[chosen]).all()
            if max(Counter(prompts.tolist()).values()) <= count / 2:  # each completion once
                assert sorted(partner) == sorted(chosen)


@pytest.mark.parametrize("packing", [True, False])
def test_the_mismatched_documents_of_a_batch_are_made_of_its_own(packing):
    """In batches of an odd number of documents too, several of which answer one prompt."""
    prompts = [i % 17 for i in range(75)]
    loader, sizes = loader_of(prompts, 3 if packing else 7, packing), set()
    for index in range(loader.batches_in(2)):
        batch = loader.batch(index)
        assert batch["mismatched_tokens"].shape == batch["tokens"].shape
        own, others = documents(batch), documents(batch, PREFIX)
        sizes.add(len(own) % 2)
        assert all(prompts[completion] != prompt for prompt, completion in others)
        for side in (0, 1):  # each prompt and each completion once, but for what finds no room in rows that are full
            missing = Counter(document[side] for document in own)
            missing.subtract(document[side] for document in others)
            assert min(missing.values()) == 0
            assert sum(missing.values()) <= (1 if packing else 0)
    assert 1 in sizes


def test_they_are_the_same_for_every_packing_and_number_of_hosts():
    prompts = [i % 11 for i in range(24)]
    packed, padded = loader_of(prompts, 24), loader_of(prompts, 24, packing=False)
    ones = [next(loader.eval_batches()) for loader in (packed, padded)]  # all documents, in one batch
    assert Counter(documents(ones[0], PREFIX)) == Counter(documents(ones[1], PREFIX))
    whole = packed.batch(1)
    parts = [packed.batch(1, rows) for rows in (range(5), range(5, 24))]
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[0][name] + parts[1][name], array, err_msg=name)


def test_those_of_an_evaluation_do_not_depend_on_its_batches():
    """Not even in batches of one row, and a last one: partners are sought in the whole set."""
    prompts = [i % 5 for i in range(13)]
    found = []
    for size in (1, 4, 13):
        batches = list(loader_of(prompts, size, packing=False, shuffle=False).eval_batches())
        found.append(Counter(document for batch in batches for document in documents(batch, PREFIX)))
        assert sum(found[-1].values()) == 13
    assert found[0] == found[1] == found[2]


def test_a_document_is_cut_where_others_are_and_where_its_row_ends_but_hardly_ever_is():
    # Full rows, all of one length: the longest prompts with the answers to the shortest are cut, nothing else.
    given = labeled(range(40), completions=(9, 10))
    loader = Loader(examples_of(given), 8, 18, False, 0, mismatched=18)
    for index in range(5):
        others = documents(loader.batch(index), PREFIX)
        assert len(others) == 8
    batch = loader_of(range(40), 8, longest=12).batch(0)
    assert max(int(row.max()) for row in batch["mismatched_positions"]) == 11
    assert max(int(row.max()) for row in batch["positions"]) > 11

    # As many tokens as before, in as many rows: about all of them fit again.
    rng, cut = np.random.default_rng(1), []
    for _ in range(20):
        lengths = np.minimum(rng.lognormal(5, 0.8, 200).astype(int) + 20, 1024)
        rows = -(-lengths.sum() // int(0.98 * 1024))
        found = mismatched.placed(lengths, np.full(200, 10), rows, 1024)
        cut.append(1 - sum(place.length for place in found) / lengths.sum())
    assert max(cut) < 0.01


def test_prompts_are_known_by_their_tokens():
    """One may be the beginning of another, and as long as another."""
    made = [
        Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= before, "f")
        for tokens, before in (([1, 2, 9], 2), ([1, 9, 9], 1), ([1, 3, 9], 2), ([1, 2, 8, 8], 2))
    ]
    prompts = Prompts.of(examples_of(made))
    assert prompts.lengths.tolist() == [2, 1, 2, 2]
    assert prompts.numbers[0] == prompts.numbers[3]
    assert len(set(prompts.numbers)) == 3


def test_the_first_batch_without_a_partner_is_found_and_the_fingerprint_tells():
    loader = loader_of([0, 1, 0, 2, 3, 1, 1, 1], 1, packing=False)
    assert len(loader.without_partner(3)) == 1
    several = loader_of([i % 9 for i in range(36)], 4, packing=False)
    assert several.without_partner(several.batches_in(3)) is None
    same = loader_of([0, 0, 0, 1, 0, 0], 2, packing=False)
    found = same.without_partner(same.batches_in(1))
    assert len(found) == 2
    assert same.prompts.numbers[found[0]] == same.prompts.numbers[found[1]]
    plain = Loader(same.examples, 2, T, False, 3)
    assert plain.fingerprint() != same.fingerprint()
    assert not any(name.startswith(PREFIX) for name in plain.batch(0))
