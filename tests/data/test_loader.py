"""A batch depends on (seed, index) alone; epochs hold every example once; nothing is lost or repeated between them."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from ftjax.data.example import Example
from ftjax.data.loader import Loader
from ftjax.errors import UserError

T = 32


def make_examples(n, seed=0):
    """Example i starts with the token 1000 + i, so that it is known in a batch; lengths 2 to T."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        tokens = rng.integers(1, 1000, rng.integers(2, T // 2)).astype(np.int32)
        tokens[0] = 1000 + i
        trained = rng.random(len(tokens)) < 0.5
        trained[0] = False
        examples.append(Example(tokens, trained, f"f:{i}"))
    return examples


def loader(n=50, batch_size=4, packing=True, seed=3, **more):
    return Loader(make_examples(n), batch_size, T, packing, seed, **more)


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


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_arrives_whole_and_every_example_once_in_an_epoch(packing):
    source = loader(packing=packing)
    by_first = {int(example.tokens[0]): example for example in source.examples}
    rows = [row for index in range(source.batches_in(3)) for row in split_rows(source.batch(index))]
    start, orders = 0, []
    for epoch in range(3):
        stop = start + source.rows_per_epoch(epoch)
        found = [document for row in rows[start:stop] for document in documents(row)]
        for tokens, targets, weights, positions in found:
            example = by_first[tokens[0]]
            assert tokens == example.tokens.tolist()
            assert targets == [*tokens[1:], 0]
            assert weights == [*example.trained[1:].tolist(), 0]
            assert positions == list(range(len(tokens)))
        orders.append([tokens[0] for tokens, *_ in found])
        assert Counter(orders[-1]) == dict.fromkeys(by_first, 1)
        start = stop
    assert orders[0] != orders[1] != orders[2]
    if not packing:
        assert source.rows_per_epoch(0) == 50
        assert all(len(first_tokens(row)) == 1 for row in rows)


def split_rows(batch):
    return [{name: array[b : b + 1] for name, array in batch.items()} for b in range(len(batch["tokens"]))]


@pytest.mark.parametrize("packing", [True, False])
def test_batches_do_not_depend_on_what_was_asked_for_before(packing):
    """So a run resumed in the middle of an epoch, or in a later one, sees what an uninterrupted run would."""
    whole = [loader(packing=packing).batch(index) for index in range(30)]
    assert loader(packing=packing).epoch_at(29) > 2
    backwards = loader(packing=packing)
    for index in reversed(range(30)):
        assert same(backwards.batch(index), whole[index])
    for start in (1, 7, 23):
        resumed = loader(packing=packing)
        assert all(same(resumed.batch(index), whole[index]) for index in range(start, 30))
    shared = loader(packing=packing)
    with ThreadPoolExecutor(4) as pool:
        for index, batch in enumerate(pool.map(shared.batch, range(30))):
            assert same(batch, whole[index])
    assert not any(same(whole[0], batch) for batch in [*whole[1:], loader(packing=packing, seed=4).batch(0)])


def test_the_batch_size_cuts_the_same_stream_of_rows():
    fours, twos = loader(batch_size=4), loader(batch_size=2)
    for index in range(20):
        halves = [twos.batch(2 * index), twos.batch(2 * index + 1)]
        assert same(fours.batch(index), {name: np.concatenate([half[name] for half in halves]) for name in halves[0]})


def test_order_of_epoch_0_is_the_same_in_every_release():
    """A run must resume after an upgrade; raw PCG64 bits do not change between NumPy versions."""
    first = first_tokens(loader(n=8, packing=False, batch_size=8, seed=0).batch(0))
    assert first == [1003, 1002, 1001, 1006, 1000, 1007, 1004, 1005]


def test_batches_in_epochs_and_epoch_at_agree():
    source = loader(packing=False)  # 50 rows, batches of 4
    assert [source.batches_in(epochs) for epochs in (0, 0.01, 1, 1.5, 2)] == [0, 1, 13, 19, 25]
    assert [source.epoch_at(index) for index in (0, 5, 25)] == [0.0, 0.4, 2.0]
    packed = loader()
    assert packed.epoch_at(packed.batches_in(3)) >= 3 > packed.epoch_at(packed.batches_in(3) - 1)


def test_packing_efficiency_is_the_share_of_tokens_in_the_batches_of_an_epoch():
    source = loader(batch_size=1)
    batches = [source.batch(index) for index in range(source.rows_per_epoch(0))]
    assert source.packing_efficiency() == pytest.approx(np.mean([batch["segment_ids"] > 0 for batch in batches]))
    assert source.packing_efficiency() > 0.9 > loader(packing=False).packing_efficiency()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_sees_every_example_once_whatever_the_batch_size(packing):
    source = loader(n=7, batch_size=5, packing=packing, shuffle=False)
    batches = list(source.eval_batches())
    assert all(array.shape == (5, T) for batch in batches for array in batch.values())
    firsts = [first for batch in batches for first in first_tokens(batch)]
    assert sorted(firsts) == list(range(1000, 1007))
    if not packing:
        assert firsts == sorted(firsts)
        assert all((array[2:] == 0).all() for array in batches[1].values())
    assert all(same(a, b) for a, b in zip(batches, source.eval_batches(), strict=True))


def test_fingerprint_changes_with_everything_that_changes_the_batches():
    base = loader()
    assert base.fingerprint() == loader().fingerprint()
    example = base.examples[5]
    tokens, trained = example.tokens.copy(), example.trained.copy()
    tokens[1] += 1
    trained[1] ^= True
    variants = [
        loader(seed=4),
        loader(packing=False),
        loader(batch_size=5),
        loader(n=51),
        loader(shuffle=False),
        Loader(base.examples, 4, T + 1, True, 3),
        Loader(base.examples[::-1], 4, T, True, 3),
        Loader([*base.examples[:5], replace(example, tokens=tokens), *base.examples[6:]], 4, T, True, 3),
        Loader([*base.examples[:5], replace(example, trained=trained), *base.examples[6:]], 4, T, True, 3),
        # The same tokens in one file, cut into other documents.
        Loader([*base.examples[:5], *cut(example), *base.examples[6:]], 4, T, True, 3),
    ]
    assert len({base.fingerprint(), *(variant.fingerprint() for variant in variants)}) == 1 + len(variants)


def cut(example):
    return [Example(example.tokens[part], example.trained[part], "") for part in (slice(0, 1), slice(1, None))]


def test_too_little_data_is_refused_before_the_first_step():
    with pytest.raises(UserError, match=r"no examples; check data.train"):
        Loader([], 4, T, True, 0)
    with pytest.raises(
        UserError, match=r"3 examples\) does not fill one batch of 4 rows; set data.batch_size to 3 or less"
    ):
        loader(n=3, packing=False)
    with pytest.raises(UserError, match=r"5 examples, packed into \d rows of 32 tokens\) does not fill one batch of 6"):
        loader(n=5, batch_size=6)
    assert len(list(loader(n=3, packing=False, shuffle=False).eval_batches())) == 1


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"f:\d+ has \d+ tokens, more than max_length 8"):
        Loader(make_examples(50), 4, 8, True, 0)
    for more in ({"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be positive and seed"):
            loader(**more)


def test_the_data_modules_import_neither_jax_nor_transformers_nor_tensorflow():
    code = (
        "import sys, ftjax.data.loader, ftjax.data.rows, ftjax.data.chat, ftjax.data.tfds_source\n"
        "heavy = {'jax', 'flax', 'transformers', 'tokenizers', 'torch', 'tensorflow', 'tensorflow_datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
