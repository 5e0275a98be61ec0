"""From scores to advantages, against the formulas written out token by token."""

import numpy as np
import pytest

from ftjax.config import defaults
from ftjax.returns import at_end, baselines, correction, gae, kl_estimates, whiten

RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], bool)


def drawn():
    """Numbers where the mask is, NaN elsewhere."""
    return np.where(MASK, RNG.standard_normal(MASK.shape), np.nan)


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_sums_of_the_paper_and_nan_elsewhere_reaches_none(discount, decay):
    rewards, values = drawn(), drawn()
    found = gae(rewards, values, MASK, discount, decay)
    assert not found[~MASK].any()
    for row in range(len(MASK)):
        r, v = rewards[row][MASK[row]], np.append(values[row][MASK[row]], 0)
        errors = r + discount * v[1:] - v[:-1]
        wanted = [sum((discount * decay) ** k * errors[t + k] for k in range(len(r) - t)) for t in range(len(r))]
        np.testing.assert_allclose(found[row][MASK[row]], wanted, rtol=1e-12, atol=1e-12)


def test_the_score_lands_on_the_last_token_and_never_on_what_follows():
    found = at_end(np.array([3.0, -2.0, 5.0, 7.0]), MASK)
    wanted = np.zeros(MASK.shape)
    wanted[0, 4], wanted[1, 6], wanted[3, 0] = 3, -2, 7
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_what_drew_the_tokens_is_corrected_for_within_bounds(mode):
    """The ratio of a token or of a whole completion, held between the bounds or 0 outside of them."""
    settings = defaults().objective
    settings.update(correction=mode, correction_min=0.5, correction_max=2.0)
    logps, sampled = drawn(), drawn()
    weights, metrics = correction(settings, logps, sampled, MASK)
    wanted, each, moved = np.zeros(MASK.shape), [], set()
    for row in np.flatnonzero(MASK.any(axis=1)):
        ratios = [float(np.exp(logps[row, t] - sampled[row, t])) for t in np.flatnonzero(MASK[row])]
        ratios = [float(np.prod(ratios))] * len(ratios) if mode.startswith("sequence") else ratios
        bounded = [min(max(ratio, 0.5), 2.0) for ratio in ratios]
        moved |= {ratio < 0.5 for ratio, within in zip(ratios, bounded, strict=True) if ratio != within}
        if mode.endswith("mask"):
            bounded = [ratio * (ratio == within) for ratio, within in zip(ratios, bounded, strict=True)]
        wanted[row, MASK[row]] = bounded
        each += bounded[:1] if mode.startswith("sequence") else bounded
    assert moved
    np.testing.assert_allclose(weights, wanted, rtol=1e-12)
    apart = np.abs(logps - sampled)[MASK]
    expected = {f"sampling/importance_sampling_ratio/{of}": getattr(np, of)(each) for of in ("min", "mean", "max")}
    expected |= {f"sampling/sampling_logp_difference/{of}": getattr(np, of)(apart) for of in ("mean", "max")}
    assert metrics == pytest.approx(expected)
    nothing, metrics = correction(settings, logps, sampled, np.zeros_like(MASK))
    assert not nothing.any()
    assert not any(metrics.values())


def test_whitened_numbers_have_mean_0_and_variance_1_over_the_mask():
    values = drawn()
    found = whiten(values, MASK)
    assert not found[~MASK].any()
    there = values[MASK]
    np.testing.assert_allclose(found[MASK], (there - there.mean()) / np.sqrt(there.var(ddof=1) + 1e-8), rtol=1e-12)
    assert not whiten(values, np.zeros(MASK.shape, bool)).any()


def test_estimates_of_kl_are_schulmans_and_two_of_them_unbiased():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    exact, every = np.sum(p * np.log(p / q)), np.ones(3, bool)
    ratio = q / p
    wanted = {"k1": -np.log(ratio), "k2": np.log(ratio) ** 2 / 2, "k3": ratio - 1 - np.log(ratio)}
    for name, values in wanted.items():
        found = kl_estimates(np.log(p), np.log(q), every, name)
        np.testing.assert_allclose(found, values, rtol=1e-12, atol=1e-15)
        assert (abs((p * found).sum() - exact) < 1e-12) == (name != "k2")
    assert not kl_estimates(np.full(3, np.nan), np.log(q), ~every, "k3").any()


def test_baselines_are_the_mean_of_the_others_or_of_all():
    rewards = np.array([[1.0, 2.0, 6.0], [0.0, 4.0, 5.0]])
    np.testing.assert_allclose(baselines(rewards, "others"), [[4, 3.5, 1.5], [4.5, 2.5, 2]])
    np.testing.assert_allclose(baselines(rewards, "batch"), np.full((2, 3), 3.0))
