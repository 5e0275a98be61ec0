"""Tokenized data sets made by hand, for the tests of what comes after tokenization."""

import hashlib

import numpy as np

from ftjax.data.format.example import Example, Row
from ftjax.data.tokens import examples as examples_lib
from ftjax.data.tokens.examples import Examples, Part


def examples_of(given, source_ids=None, weights=(1.0,), replayed=None):
    """The `Examples` of a list of `Example`."""
    flat = [np.where(one.trained, one.tokens | examples_lib.TRAINED, one.tokens) for one in given]
    lengths = np.array([len(one) for one in flat], np.int32)
    tokens = np.concatenate(flat or [np.zeros(0, np.int32)])
    documents = len(given[0].lengths or (0,)) if given else 1
    return Examples.of(
        np.array([one.lengths or (len(one.tokens),) for one in given], np.int32).reshape(len(given), documents),
        parts=(Part(tokens, _labels(given), [Row({}, one.origin) for one in given]),),
        rows=np.arange(len(given)),
        source_ids=np.zeros(len(given), np.int32) if source_ids is None else np.asarray(source_ids, np.int32),
        weights=tuple(weights),
        replayed=replayed or (False,) * len(weights),
        digest=hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest(),
        report={},
    )


def _labels(given):
    labels = [one.labels for one in given if one.labels is not None]
    return np.concatenate(labels or [np.zeros(0, np.float32)])


def make_examples(n, longest=16, seed=0):
    """Example i starts with the token 1000 + i, so that it is known in a batch; lengths 2 to `longest` - 1."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        tokens = rng.integers(1, 1000, rng.integers(2, longest)).astype(np.int32)
        tokens[0] = 1000 + i
        trained = rng.random(len(tokens)) < 0.5
        trained[0] = False
        made.append(Example(tokens, trained, f"f:{i}"))
    return made
