"""A reward model's accuracy and calibration, against loops over the pairs."""

import numpy as np
import pytest

from ftjax.evals.calibration import calibration


def test_against_a_loop_over_the_pairs():
    likelihood = np.random.default_rng(0).beta(3, 1.5, 500)
    found = calibration(likelihood)
    bins = [[] for _ in range(10)]
    for p in likelihood:
        confidence = p if p > 0.5 else 1 - p
        bins[min(int((confidence - 0.5) / 0.05), 9)].append((confidence, p > 0.5))
    error = 0.0
    for its, pairs in zip(found.bins, bins, strict=True):
        assert its.count == len(pairs)
        confidence, accuracy = np.mean(pairs, axis=0)
        assert (its.confidence, its.accuracy) == pytest.approx((confidence, accuracy), rel=1e-12)
        error += len(pairs) / 500 * abs(accuracy - confidence)
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.brier == pytest.approx(np.mean([(1 - p) ** 2 for p in likelihood]), rel=1e-12)
    assert found.accuracy == np.mean(likelihood > 0.5)


def test_who_is_as_often_right_as_it_says_has_no_error_and_who_is_always_sure_has():
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 20_000)
    right = rng.uniform(size=20_000) < sure
    assert calibration(np.where(right, sure, 1 - sure)).error < 0.02
    always = calibration(np.where(right, 1.0, 0.0))
    assert always.error == pytest.approx(1 - right.mean())
    assert [its.count for its in always.bins] == [0] * 9 + [20_000]
    coin = calibration(np.array([0.5]))  # prefers neither, and so not the better one
    assert (coin.accuracy, coin.brier) == (0.0, 0.25)
