"""Schedules by their values, AdamW against torch's."""

import jax
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict
from support.tiny import OPTIMIZER

from ftjax.training.optim import make_optimizer, make_schedule


def rates(name, warmup_ratio=0.0, final_ratio=0.0, steps=10, peak=1.0):
    config = ConfigDict({"name": name, "warmup_ratio": warmup_ratio, "final_ratio": final_ratio})
    schedule = make_schedule(peak, config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_shapes_without_warm_up():
    np.testing.assert_allclose(rates("constant"), np.ones(11))
    np.testing.assert_allclose(rates("linear"), 1 - np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(rates("linear", final_ratio=0.5), 1 - np.arange(11) / 20, atol=1e-6)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2
    np.testing.assert_allclose(rates("cosine", final_ratio=0.1), cosine, atol=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_rises_from_more_than_zero_to_the_peak(name):
    values = rates(name, warmup_ratio=0.4, peak=2e-4)
    np.testing.assert_allclose(values[:5], 2e-4 * np.array([0.2, 0.4, 0.6, 0.8, 1.0]), rtol=1e-5)
    assert values[-1] == pytest.approx(2e-4 if name == "constant" else 0.0, abs=1e-10)
    assert (np.diff(values[4:]) <= 0).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs_have_a_positive_rate(steps):
    for warmup_ratio in (0.0, 0.03, 1.0):
        assert (rates("cosine", warmup_ratio, steps=steps)[:steps] > 0).all()


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(KeyError):
        rates("exponential")


@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.1)])
def test_adamw_and_clipping_against_torch(clip, decay):
    """Five steps; the norm scale is spared from weight decay by our rule, so torch gets it as a group without."""
    rng = np.random.default_rng(0)
    params = {
        "mlp": {"kernel": rng.standard_normal((4, 3)).astype(np.float32)},
        "norm": {"scale": np.ones(3, np.float32)},
    }
    config = ConfigDict(OPTIMIZER.to_dict() | {"clip_norm": clip, "weight_decay": decay})
    optimizer = make_optimizer(config, optax.constant_schedule(0.05))
    state = optimizer.init(params)
    kernel, scale = (
        torch.nn.Parameter(torch.tensor(leaf)) for leaf in (params["mlp"]["kernel"], params["norm"]["scale"])
    )
    groups = [{"params": [kernel], "weight_decay": decay}, {"params": [scale], "weight_decay": 0.0}]
    witness = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(5):
        gradients = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        kernel.grad, scale.grad = torch.tensor(gradients["mlp"]["kernel"]), torch.tensor(gradients["norm"]["scale"])
        if clip:
            torch.nn.utils.clip_grad_norm_([kernel, scale], clip)
        witness.step()
    np.testing.assert_allclose(params["mlp"]["kernel"], kernel.detach(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(params["norm"]["scale"], scale.detach(), rtol=0, atol=2e-6)
