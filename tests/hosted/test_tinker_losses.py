"""What forward_backward minimizes, against float64 NumPy: values, and gradients by central differences."""

import jax
import numpy as np
import pytest

from ftjax.hosted.tinker.losses import LOSSES

LOW, HIGH, BETA = 0.8, 1.2, 0.05


def witness(name, logps, sampled, advantages, weights):
    """The formulas of Tinker's documentation, with the part that has no gradient given as `weights`."""
    ratios = np.exp(logps - sampled)
    clipped = np.clip(ratios, LOW, HIGH)
    return {
        "cross_entropy": lambda: -logps * weights,
        "importance_sampling": lambda: -ratios * advantages,
        "ppo": lambda: -np.minimum(ratios * advantages, clipped * advantages),
        "cispo": lambda: -weights * logps * advantages,
        "dro": lambda: -(logps * advantages - 0.5 * BETA * (logps - sampled) ** 2),
    }[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name):
    rng = np.random.default_rng(0)
    logps = -rng.exponential(1, (3, 8))
    # Ratios on both sides of the bounds, none at one of them.
    sampled = logps - np.log(rng.choice([0.5, 0.9, 1.1, 1.7], (3, 8)))
    advantages = rng.standard_normal((3, 8))
    weights = np.clip(np.exp(logps - sampled), LOW, HIGH) if name == "cispo" else rng.uniform(-1, 1, (3, 8))
    given = {"weights": weights, "logprobs": sampled, "advantages": advantages}
    inputs = {key: np.float32(given[key]) for key in LOSSES[name].inputs}
    values = {"clip_low_threshold": LOW, "clip_high_threshold": HIGH, "beta": BETA}
    settings = {key: np.float32(values[key]) for key in LOSSES[name].settings}

    def loss(logps):
        losses = LOSSES[name].function(logps, inputs, settings)
        return losses.sum(), losses

    gradients, losses = jax.grad(loss, has_aux=True)(np.float32(logps))
    expected = witness(name, logps, sampled, advantages, weights)
    step = 1e-6
    ahead, behind = (witness(name, logps + shift, sampled, advantages, weights) for shift in (step, -step))
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_a_loss_is_a_sum_that_is_divided_nowhere():
    logps = np.full((1, 4), -2, np.float32)
    losses = LOSSES["cross_entropy"].function(logps, {"weights": np.ones((1, 4), np.float32)}, {})
    assert float(losses.sum()) == 8
