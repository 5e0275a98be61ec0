"""A batch depends on (seed, index) alone; epochs hold what they should; nothing is lost or repeated between them."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from support.tokenized import examples_of, make_examples

from ftjax.data.batch.loader import Loader
from ftjax.data.format.example import Example
from ftjax.errors import UserError

T = 32


def loader(n=50, batch_size=4, packing=True, seed=3, source_ids=None, weights=(1.0,), **more):
    return Loader(examples_of(make_examples(n), source_ids, weights), batch_size, T, packing, seed, **more)


def documents(batch):
    """(tokens, targets, weights, positions) of every document of a batch, row by row."""
    for b in range(len(batch["tokens"])):
        segments = batch["segment_ids"][b]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            yield tuple(batch[name][b, here].tolist() for name in ("tokens", "targets", "weights", "positions"))


def first_tokens(batch):
    return [tokens[0] for tokens, *_ in documents(batch)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def split_rows(batch):
    return [{name: array[b : b + 1] for name, array in batch.items()} for b in range(len(batch["tokens"]))]


def epochs_of(source, epochs):
    """The rows of each of the first epochs, as they come out of the batches."""
    rows = [row for index in range(source.batches_in(epochs)) for row in split_rows(source.batch(index))]
    start = 0
    for epoch in range(epochs):
        stop = start + source.rows_per_epoch(epoch)
        yield rows[start:stop]
        start = stop


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_arrives_whole_and_every_example_once_in_an_epoch(packing):
    source = loader(packing=packing)
    by_first = {int(example.tokens[0]): example for example in source.examples}
    orders = []
    for rows in epochs_of(source, 3):
        seen = [document for row in rows for document in documents(row)]
        for tokens, targets, weights, positions in seen:
            example = by_first[tokens[0]]
            assert tokens == example.tokens.tolist()
            assert targets == [*tokens[1:], 0]
            assert weights == [*example.trained[1:].tolist(), 0]
            assert positions == list(range(len(tokens)))
        orders.append([tokens[0] for tokens, *_ in seen])
        assert Counter(orders[-1]) == dict.fromkeys(by_first, 1)
        if not packing:
            assert len(rows) == 50
            assert all(len(first_tokens(row)) == 1 for row in rows)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5), (0.1, 1.5, 3.0), (0.3, 0.3, 1.0)])
def test_an_epoch_has_the_examples_of_a_source_as_often_as_its_weight_says(packing, weights):
    """Ten epochs hold each example of a source exactly 10 x its weight times, and no part of them much more or less."""
    ids = np.arange(60) % 3
    source = loader(60, packing=packing, source_ids=ids, weights=weights)
    so_far = Counter()
    for epoch, rows in enumerate(epochs_of(source, 10), 1):
        so_far.update(tokens[0] - 1000 for row in rows for tokens, *_ in documents(row))
        for at, weight in enumerate(weights):
            counts = [so_far[i] for i in range(60) if ids[i] == at]
            assert sum(counts) == int(round(epoch * weight * 20, 6))
            assert max(counts) - min(counts) <= 1
    assert all(so_far[i] == round(10 * weights[ids[i]]) for i in range(60))


def test_with_half_the_weight_the_halves_change_from_pass_to_pass():
    source = loader(60, packing=False, weights=(0.5,))
    seen = [frozenset(first for row in rows for first in first_tokens(row)) for rows in epochs_of(source, 6)]
    assert all(not a & b and len(a | b) == 60 for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert len(set(seen)) == 6


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(1.0,), (0.7,)])
def test_batches_do_not_depend_on_what_was_asked_for_before(packing, weights):
    """So a run resumed in the middle of an epoch, or in a later one, sees what an uninterrupted run would."""

    def fresh(**more):
        return loader(packing=packing, weights=weights, **more)

    n = fresh().batches_in(3.2)
    whole = [fresh().batch(index) for index in range(n)]
    backwards = fresh()
    for index in reversed(range(n)):
        assert same(backwards.batch(index), whole[index])
    for start in (1, 7, n // 2, n - 2):
        resumed = fresh()
        assert all(same(resumed.batch(index), whole[index]) for index in range(start, n))
    shared = fresh()
    with ThreadPoolExecutor(4) as pool:
        for index, batch in enumerate(pool.map(shared.batch, range(n))):
            assert same(batch, whole[index])
    assert not any(same(whole[0], batch) for batch in [*whole[1:], fresh(seed=4).batch(0)])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_rows_of_all_hosts_together_are_the_batch(packing, hosts):
    """Whatever the share of a host, which with micro-batches is more than one range of rows."""
    for index in range(20):
        whole = loader(batch_size=8, packing=packing).batch(index)
        shares = [loader(batch_size=8, packing=packing).batch(index, range(host, 8, hosts)) for host in range(hosts)]
        assert same(whole, {name: sum(share[name] for share in shares) for name in whole})
        assert sum(np.count_nonzero(share["segment_ids"]) for share in shares) == loader(
            batch_size=8, packing=packing
        ).batch_tokens(index)


def test_the_batch_size_cuts_the_same_stream_of_packed_rows():
    fours, twos = loader(batch_size=4), loader(batch_size=2)
    for index in range(20):
        halves = [twos.batch(2 * index), twos.batch(2 * index + 1)]
        assert same(fours.batch(index), {name: np.concatenate([half[name] for half in halves]) for name in halves[0]})


def test_order_of_epoch_0_is_the_same_in_every_release():
    """A run must resume after an upgrade; raw PCG64 bits do not change between NumPy versions."""
    given = [Example(np.full(4, 1000 + i, np.int32), np.arange(4) > 0, "") for i in range(8)]
    equal = Loader(examples_of(given), 8, T, False, 0)
    assert first_tokens(equal.batch(0)) == [1003, 1002, 1001, 1006, 1000, 1007, 1004, 1005]
    # Two of 4 tokens to a row of 8, in the same order; and two lengths, which go together in a row.
    assert first_tokens(Loader(examples_of(given), 4, 8, True, 0).batch(0)) == first_tokens(equal.batch(0))
    given = [Example(np.full(3 + i % 4, 1000 + i, np.int32), np.arange(3 + i % 4) > 0, "") for i in range(8)]
    rows = split_rows(Loader(examples_of(given), 4, 9, True, 0).batch(0))
    assert [first_tokens(row) for row in rows] == [[1003, 1000], [1002, 1001], [1007, 1004], [1006, 1005]]


def test_batches_in_epochs_and_epoch_at_agree():
    source = loader(packing=False)  # 50 rows, batches of 4
    assert [source.batches_in(epochs) for epochs in (0, 0.01, 1, 1.5, 2)] == [0, 1, 13, 19, 25]
    assert [source.epoch_at(index) for index in (0, 5, 25)] == [0.0, 0.4, 2.0]
    packed = loader()
    assert packed.epoch_at(packed.batches_in(3)) >= 3 > packed.epoch_at(packed.batches_in(3) - 1)


@pytest.mark.parametrize("packing", [True, False])
def test_efficiency_is_the_share_of_tokens_in_the_batches_of_an_epoch(packing):
    source = loader(n=200, batch_size=1 if packing else 8, packing=packing)
    batches = [source.batch(index) for index in range(source.rows_per_epoch(0) // source.batch_size)]
    places = sum(batch["tokens"].size for batch in batches)
    tokens = sum(np.count_nonzero(batch["segment_ids"]) for batch in batches)
    assert source.packing_efficiency() == pytest.approx(tokens / places)
    assert source.packing_efficiency() > (0.97 if packing else 0.65)  # of at most 15 tokens, in steps of 8


def test_unpacked_batches_have_few_lengths_and_rows_of_similar_length(record_figure):
    rng = np.random.default_rng(5)
    given = [
        Example(np.full(length, 1000 + i, np.int32), np.arange(length) > 0, "")
        for i, length in enumerate(np.clip(rng.lognormal(5, 0.8, 3000).astype(int), 2, 1024))
    ]
    source = Loader(examples_of(given), 16, 1024, False, 0)
    batches = [source.batch(index) for index in range(source.batches_in(1))]
    assert {batch["tokens"].shape[1] for batch in batches} <= set(source.lengths)
    assert len(source.lengths) <= 8
    assert all(length % 32 == 0 for length in source.lengths)
    record_figure("share_of_tokens_with_buckets", source.packing_efficiency())
    assert source.packing_efficiency() > 0.8
    assert source.packing_efficiency() > 4 * np.mean([len(one.tokens) for one in given]) / 1024
    # The lengths of batches come in no order, so a run does not go from short to long.
    shapes = [batch["tokens"].shape[1] for batch in batches]
    assert abs(np.corrcoef(np.arange(len(shapes)), shapes)[0, 1]) < 0.2


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_example_once_whatever_the_batch_size_and_the_weight(packing):
    source = loader(n=7, batch_size=5, packing=packing, shuffle=False, weights=(0.5,))
    batches = list(source.eval_batches())
    assert all(len(array) == 5 for batch in batches for array in batch.values())
    assert all(batch["tokens"].shape[1] in source.lengths for batch in batches)
    firsts = [first for batch in batches for first in first_tokens(batch)]
    assert sorted(firsts) == list(range(1000, 1007))
    if not packing:
        assert all((array[2:] == 0).all() for array in batches[1].values())
    assert all(same(a, b) for a, b in zip(batches, source.eval_batches(), strict=True))
    shares = zip(source.eval_batches(range(0, 5, 2)), source.eval_batches(range(1, 5, 2)), strict=True)
    for whole, (a, b) in zip(batches, shares, strict=True):
        assert same(whole, {name: a[name] + b[name] for name in whole})


def test_fingerprint_changes_with_everything_that_changes_the_batches():
    given = make_examples(50)
    base = loader()
    assert base.fingerprint() == loader().fingerprint()
    example = given[5]
    tokens, trained = example.tokens.copy(), example.trained.copy()
    tokens[1] += 1
    trained[1] ^= True

    def of(changed, T=T):
        return Loader(examples_of(changed), 4, T, True, 3)

    variants = [
        loader(seed=4),
        loader(packing=False),
        loader(batch_size=5),
        loader(n=51),
        loader(shuffle=False),
        loader(weights=(0.5,)),
        loader(weights=(0.5,), packing=False),
        loader(weights=(1.0, 2.0), source_ids=np.arange(50) % 2),
        loader(weights=(1.0, 2.0), source_ids=np.arange(50) < 25),
        of(given, T + 1),
        of(given[::-1]),
        of([*given[:5], replace(example, tokens=tokens), *given[6:]]),
        of([*given[:5], replace(example, trained=trained), *given[6:]]),
        # The same tokens in one file, cut into other documents.
        of([*given[:5], *cut(example), *given[6:]]),
    ]
    # What is only padding may change with the mesh.
    assert loader(packing=False, multiple=16).fingerprint() == loader(packing=False).fingerprint()
    assert len({base.fingerprint(), *(variant.fingerprint() for variant in variants)}) == 1 + len(variants)


def cut(example):
    return [Example(example.tokens[part], example.trained[part], "") for part in (slice(0, 1), slice(1, None))]


def test_no_data_is_refused_before_the_first_step():
    with pytest.raises(UserError, match=r"no examples; check data.train"):
        Loader(examples_of([]), 4, T, True, 0)
    with pytest.raises(UserError, match=r"an epoch has no examples; raise the weights"):
        loader(n=1, packing=False, weights=(0.5,))
    assert len(list(loader(n=3, packing=False, shuffle=False).eval_batches())) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_larger_than_an_epoch_holds_several(packing):
    source = loader(n=3, batch_size=8, packing=packing)
    rows = source.rows_per_epoch(0)
    assert rows < 8
    assert source.batches_in(8.0) == rows
    seen = Counter(
        first for index in range(rows) for row in split_rows(source.batch(index)) for first in first_tokens(row)
    )
    assert len(seen) == 3
    assert set(seen.values()) == {8}


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"f:\d+ has \d+ tokens, more than max_length 8"):
        Loader(examples_of(make_examples(50)), 4, 8, True, 0)
    for more in ({"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive and seed"):
            loader(**more)


def test_the_data_modules_import_neither_jax_nor_transformers_nor_tensorflow():
    code = (
        "import sys, ftjax.data.pipeline, ftjax.data.batch.prefetch, ftjax.data.read.tfds_source\n"
        "heavy = {'jax', 'flax', 'transformers', 'tokenizers', 'torch', 'tensorflow', 'tensorflow_datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
