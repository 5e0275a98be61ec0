"""The choice of one token, held against transformers' logits processors and against the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftjax.errors import UserError
from ftjax.sampling.sampler import Sampling, filter_logits, row_keys, sample, step_keys


def random_logits(rows=6, vocabulary=97):
    return (4 * np.random.default_rng(0).standard_normal((rows, vocabulary))).astype(np.float32)


def transformers_filter(logits, sampling):
    """The processors `generate` makes for these options, in its order."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, torch.tensor(logits))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.numpy()


@pytest.mark.parametrize("temperature", [0.7, 1, 1.9])
@pytest.mark.parametrize("top_k", [0, 1, 10, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_filtered_logits_are_those_of_transformers(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    ours = np.asarray(filter_logits(jnp.asarray(random_logits()), sampling))
    theirs = transformers_filter(random_logits(), sampling)
    assert np.isfinite(theirs).any(axis=-1).all()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_temperature_zero_is_greedy_whatever_the_rest_says():
    logits = random_logits()
    keys = row_keys(0, jnp.arange(len(logits)))
    tokens = sample(jnp.asarray(logits), keys, Sampling(temperature=0, top_k=3, top_p=0.5))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_tokens_are_drawn_with_the_filtered_probabilities():
    draws = 20_000
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.95)
    logits = np.array([[2.0, 1.0, 0.5, -1.0, 1.5, 0.0]], np.float32)
    expected = torch.softmax(torch.tensor(transformers_filter(logits, sampling)), dim=-1).numpy()[0]
    assert 1 < np.count_nonzero(expected) < logits.size
    tokens = sample(jnp.tile(logits, (draws, 1)), row_keys(1, jnp.arange(draws)), sampling)
    frequencies = np.bincount(tokens, minlength=logits.size) / draws
    assert (frequencies[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(frequencies - expected) <= 5 * deviation).all()


def test_equally_likely_tokens_are_let_in_together():
    kept = np.isfinite(filter_logits(jnp.array([[1.0, 3.0, 1.0, 0.0]]), Sampling(1.0, top_k=2)))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_a_rows_key_depends_on_seed_number_and_count_and_not_on_its_place():
    def bits(seed, rows, count):
        return np.asarray(jax.random.key_data(step_keys(row_keys(seed, jnp.array(rows)), count)))

    np.testing.assert_array_equal(bits(3, [7, 4], 5), bits(3, [4, 7], 5)[::-1])
    different = [bits(3, [7], 5), bits(4, [7], 5), bits(3, [8], 5), bits(3, [7], 6)]
    assert len({key.tobytes() for key in different}) == len(different)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        Sampling(**{key: value})
