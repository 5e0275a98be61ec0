"""NEFTune's noise: as large as the paper says for each document, everywhere else none, and only in training."""

import dataclasses

import jax
import numpy as np
from support.tiny import batch_of, documents, numpy_params, spec

from ftjax.models.decoder import Decoder
from ftjax.models.neftune import noise

ALPHA, WIDTH = 5.0, 400
DOCUMENTS = documents(0, [4, 9, 6])
BATCH = batch_of([DOCUMENTS[:2], DOCUMENTS[2:]], 15)
PLACED = BATCH["tokens"], BATCH["positions"], BATCH["segment_ids"]


def test_it_is_uniform_up_to_alpha_over_the_root_of_a_documents_tokens_and_the_width():
    """For 36 or more hundred draws from -s to s: none beyond s, one near it, a mean near 0, a variance of s^2 / 3."""
    found = np.asarray(noise(jax.random.key(0), BATCH["positions"], BATCH["segment_ids"], WIDTH, ALPHA))
    assert found.dtype == np.float32
    for row, columns, length in ((0, slice(0, 4), 4), (0, slice(4, 13), 9), (1, slice(0, 6), 6)):
        size, draws = ALPHA / np.sqrt(length * WIDTH), found[row, columns]
        assert 0.99 * size < np.abs(draws).max() <= size * (1 + 1e-6)
        assert abs(draws.mean()) < 6 * size / np.sqrt(3 * draws.size)
        np.testing.assert_allclose(draws.var(), size**2 / 3, rtol=0.1)
    assert not found[BATCH["segment_ids"] == 0].any()
    flat = found[BATCH["segment_ids"] > 0]
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 6 / np.sqrt(WIDTH), "each token has draws of its own"


def test_a_model_has_it_in_training_alone():
    model = Decoder(spec())
    noisy = dataclasses.replace(model, neftune=ALPHA)
    variables = {"params": numpy_params(model)}

    def hidden(model, key):
        rngs = None if key is None else {"dropout": key}
        return np.asarray(jax.jit(model.apply)(variables, *PLACED, rngs=rngs)[0])

    plain, first = hidden(model, jax.random.key(0)), hidden(noisy, jax.random.key(0))
    np.testing.assert_array_equal(hidden(noisy, None), plain)
    assert not np.array_equal(first, plain)
    assert not np.array_equal(hidden(noisy, jax.random.key(1)), first)


def test_what_it_adds_is_the_noise():
    """The model with the noise is the model of embeddings to which it was added."""
    model = Decoder(spec(), neftune=ALPHA)
    params = numpy_params(model)
    places = (BATCH["positions"], BATCH["segment_ids"])
    numbered = np.arange(BATCH["tokens"].size, dtype=np.int32).reshape(BATCH["tokens"].shape)
    table = params["embed_tokens"]["embedding"][BATCH["tokens"].reshape(-1)]
    with_rows = params | {"embed_tokens": {"embedding": table}}  # a row for each token of the batch
    plain = Decoder(spec(vocab_size=table.shape[0]))
    hidden, _ = model.apply({"params": params}, BATCH["tokens"], *places, rngs={"dropout": jax.random.key(3)})
    key = model.apply({}, rngs={"dropout": jax.random.key(3)}, method=lambda module: module.make_rng("dropout"))
    added = np.asarray(noise(key, *places, model.spec.hidden_size, ALPHA)).reshape(table.shape)
    with_rows["embed_tokens"]["embedding"] = table + added
    expected, _ = plain.apply({"params": with_rows}, numbered, *places)
    real = BATCH["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], np.asarray(expected)[real], rtol=0, atol=1e-5)
