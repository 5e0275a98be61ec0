"""Pairs are asked about in the order of disagreement, and without one in a random order that is always the same."""

import numpy as np
import pytest
import scipy.stats
from support.labeling import make_pairs

from ftjax.labeling.draws import draw
from ftjax.labeling.order import order


def test_the_pairs_on_which_the_ensemble_disagrees_most_come_first(tmp_path):
    pairs = make_pairs(tmp_path, prompts=6)
    known = dict(zip((pair.id for pair in pairs), [0.5, 2.0, 0.5, 0.1, 3.0, 0.5]))
    found = order(pairs, lambda asked: np.array([known[pair.id] for pair in asked]), seed=1)
    assert [known[pair.id] for pair in found] == sorted(known.values(), reverse=True)
    equal = [pair for pair in found if known[pair.id] == 0.5]
    assert equal == [pair for pair in order(pairs, seed=1) if known[pair.id] == 0.5]
    for wrong in (np.zeros(5), np.full(6, np.nan)):
        with pytest.raises(ValueError, match="6 finite numbers"):
            order(pairs, lambda asked, wrong=wrong: wrong)


def test_the_random_order_depends_on_the_seed_alone(tmp_path):
    pairs = make_pairs(tmp_path, prompts=30)
    found = order(pairs, seed=4)
    assert found == order(pairs[::-1], seed=4)
    assert [pair for pair in found if pair in pairs[:9]] == order(pairs[:9], seed=4)  # of what is left to label, too
    assert len({order(pairs, seed=seed)[0].id for seed in range(20)}) > 8


def test_draws_are_uniform():
    drawn = np.array([draw(seed, "left", str(name)) for seed in range(4) for name in range(1000)])
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.001
