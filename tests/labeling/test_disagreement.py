"""The disagreement of an ensemble on pairs, and that it decides what is asked first."""

import functools

import numpy as np
import pytest
from support.labeling import make_pairs

from ftjax import rewards
from ftjax.errors import UserError
from ftjax.labeling.disagreement import disagreement, of_reward_model
from ftjax.labeling.order import order


class Model:
    """What `rewards.load` gives, as far as it is used here."""

    def __init__(self, heads, reward=1.0):
        self.heads, self.reward = heads, reward

    def tokens(self, turns, tools):
        assert (turns[-1]["role"], tools) == ("assistant", None)
        return turns

    def scores_of(self, conversations):
        return np.full((len(conversations), self.heads), self.reward, np.float32)


def test_one_head_and_rewards_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    pairs = make_pairs(tmp_path)
    monkeypatch.setattr(rewards, "load", lambda path: Model(int(path)))
    with pytest.raises(UserError, match="--reward 1: has one head, and only several can disagree"):
        of_reward_model("1")
    found, heads = of_reward_model("3")
    assert (found(pairs).tolist(), heads) == ([0, 0, 0], 3)
    monkeypatch.setattr(rewards, "load", lambda path: Model(2, np.nan))
    with pytest.raises(UserError, match="no finite numbers"):
        of_reward_model("runs/reward")[0](pairs)


def test_it_is_the_variance_over_heads_of_the_difference_of_rewards(tmp_path):
    pairs, rng, rewards = make_pairs(tmp_path, prompts=4, answers=3), np.random.default_rng(0), {}

    def scorer(conversations):
        assert len(conversations) == len({repr(one) for one in conversations}) == 12
        for turns, _ in conversations:
            rewards[turns[0]["content"], turns[-1]["content"]] = rng.normal(size=5).astype(np.float32)
        return np.array([rewards[turns[0]["content"], turns[-1]["content"]] for turns, _ in conversations], np.float32)

    found = disagreement(pairs, scorer)
    assert found.dtype == np.float64
    for pair, value in zip(pairs, found):
        prompt, a, b = pair.texts
        difference = [float(x) - float(y) for x, y in zip(rewards[prompt, a], rewards[prompt, b])]
        mean = sum(difference) / 5
        np.testing.assert_allclose(value, sum((one - mean) ** 2 for one in difference) / 5, rtol=1e-6)
    first = order(pairs, functools.partial(disagreement, scorer=scorer))
    rewards_first = disagreement(
        first, lambda asked: np.array([rewards[t[0]["content"], t[-1]["content"]] for t, _ in asked])
    )
    assert list(rewards_first) == sorted(rewards_first, reverse=True)
