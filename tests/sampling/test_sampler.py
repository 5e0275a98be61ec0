"""The choice of one token, held against transformers' logits processors and against the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from support.filters import transformers_filter

from ftjax.errors import UserError
from ftjax.sampling import sampler
from ftjax.sampling.sampler import Sampling, Settings, choose, filter_logits, row_keys, step_keys


def random_logits(rows=6, vocabulary=97):
    return (4 * np.random.default_rng(0).standard_normal((rows, vocabulary))).astype(np.float32)


def keys_of(count, seed=0):
    return row_keys(jnp.full(count, seed, jnp.uint32), jnp.arange(count))


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(filter_logits), jax.jit(choose)


@pytest.mark.parametrize("min_p", [0.0, 0.2])
@pytest.mark.parametrize("top_k", [0, 1, 10, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
def test_the_filtered_logits_are_those_of_transformers(compiled, top_k, top_p, min_p):
    """Of rows whose temperatures differ, in one call."""
    samplings = [Sampling(temperature, top_k, top_p, min_p=min_p) for temperature in (0.7, 1, 1.9)] * 2
    ours = np.asarray(compiled[0](jnp.asarray(random_logits()), Settings.of(samplings)))
    for row, sampling in enumerate(samplings):
        theirs = transformers_filter(random_logits()[row : row + 1], sampling)[0]
        assert np.isfinite(theirs).any()
        np.testing.assert_array_equal(np.isfinite(ours[row]), np.isfinite(theirs))
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-6)


def test_each_row_has_its_own_settings(compiled):
    """Greedy rows beside drawn ones, with the likelihoods of both under both distributions."""
    logits, samplings = random_logits(), [Sampling(), Sampling(1.3), Sampling(0.8, top_k=3)] * 2
    chosen = compiled[1](jnp.asarray(logits), keys_of(6), Settings.of(samplings))
    np.testing.assert_array_equal(chosen.tokens[::3], logits.argmax(axis=-1)[::3])
    assert chosen.tokens.dtype == jnp.int32
    for row, sampling in enumerate(samplings):
        token = int(chosen.tokens[row])
        full = torch.log_softmax(torch.tensor(logits[row]).double(), -1)[token]
        np.testing.assert_allclose(chosen.full_logps[row], full, rtol=1e-5)
        tempered = torch.log_softmax(torch.tensor(logits[row]).double() / (sampling.temperature or 1), -1)[token]
        np.testing.assert_allclose(chosen.tempered_logps[row], tempered, rtol=1e-5)
        if not sampling.temperature:
            assert chosen.logps[row] == 0
            continue
        kept = torch.tensor(transformers_filter(logits[row : row + 1], sampling)[0]).double()
        np.testing.assert_allclose(chosen.logps[row], torch.log_softmax(kept, -1)[token], rtol=1e-5)


def test_temperature_zero_is_greedy_whatever_the_rest_says(compiled):
    logits = random_logits()
    tokens = compiled[1](jnp.asarray(logits), keys_of(6), Settings.of([Sampling(0, top_k=3, top_p=0.5)] * 6)).tokens
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


@pytest.mark.parametrize("sampling", [Sampling(0.8, top_k=40, top_p=0.95), Sampling(1.0)], ids=["filtered", "all"])
def test_tokens_are_drawn_with_the_filtered_probabilities(compiled, sampling, record_figure):
    """A chi-square test over a vocabulary of several of the blocks that a draw looks at, most of it unlikely."""
    draws, vocabulary = 8_000, 3 * sampler.BLOCK + 7
    logits = np.random.default_rng(4).standard_normal((1, vocabulary)).astype(np.float32) * 2
    expected = torch.softmax(torch.tensor(transformers_filter(logits, sampling)).double(), dim=-1).numpy()[0]
    tokens = [
        np.asarray(compiled[1](jnp.tile(logits, (2000, 1)), keys_of(2000, seed), Settings.of([sampling] * 2000)).tokens)
        for seed in range(draws // 2000)
    ]
    counts = np.bincount(np.concatenate(tokens), minlength=vocabulary)
    assert not counts[expected == 0].any()
    # Tokens that are expected less than five times count together, as the test wants it.
    often = expected * draws >= 5
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * draws
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    p = stats.chisquare(seen, wanted).pvalue
    record_figure(f"p, {sampling.top_k}", p)
    assert p > 1e-3


def test_a_token_of_probability_zero_is_never_drawn():
    """Not either where the uniform number is so close to 1 that its product with the sum is the sum."""
    weights = jnp.array([[0.0, 1.0, 0.0, 3.0, 0.0]])
    nearly_one = np.nextafter(np.float32(1), np.float32(0))
    found = [
        int(sampler._inverse(weights, jnp.array([u], jnp.float32))[0]) for u in (0.0, 0.2, 0.25, 0.9, nearly_one, 1)
    ]
    assert found == [1, 1, 3, 3, 3, 3]


def test_equally_likely_tokens_are_let_in_together(compiled):
    kept = np.isfinite(compiled[0](jnp.array([[1.0, 3.0, 1.0, 0.0]]), Settings.of([Sampling(1.0, top_k=2)])))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_a_rows_key_depends_on_seed_number_and_count_and_not_on_its_place():
    def bits(seed, rows, count):
        seeds, counts = jnp.full(len(rows), seed, jnp.uint32), jnp.full(len(rows), count)
        return np.asarray(jax.random.key_data(step_keys(row_keys(seeds, jnp.array(rows)), counts)))

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
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key}="):
        Sampling(**{key: value})
