"""The step on a problem small enough to do by hand: weighted least squares, in NumPy beside it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.tiny import one_device

from ftjax import sharding, tree
from ftjax.objectives.loss import Loss
from ftjax.training.state import abstract_state, init_state
from ftjax.training.step import compiling, kernels_in, make_eval_step, make_step

RATE = 0.1


def squares(variables, batch, rng):
    """Sum of weight * (x . w + bias - y)^2; `noise` shows which random key each micro-batch got."""
    errors = batch["x"] @ variables["params"]["w"] + variables["params"]["bias"] - batch["y"]
    weight = batch["weights"].sum()
    noise = 0.0 if rng is None else jax.random.normal(rng)  # as in an evaluation
    metrics = {"error": (jnp.sum(jnp.abs(errors) * batch["weights"]), weight), "noise": (noise, 1.0)}
    return Loss(jnp.sum(errors**2 * batch["weights"]), weight, jax.tree.map(jnp.float32, metrics))


@pytest.fixture
def start():
    """(step, state, frozen, optimizer)"""
    whole = sharding.replicated(one_device())
    trainable = {"params": {"w": jax.device_put(jnp.array([1.0, -2.0, 0.5]), whole)}}
    frozen = {"params": {"bias": jax.device_put(jnp.float32(0.25), whole)}}
    schedule = optax.linear_schedule(RATE, 0.0, 10)
    optimizer = optax.sgd(schedule)
    abstract = abstract_state(optimizer, trainable, one_device())
    return make_step(squares, optimizer, schedule, abstract, 0), init_state(optimizer, trainable, abstract), frozen


def batch(accumulate, seed=0):
    """Twelve examples, most of the weight in the first of them: micro-batches of very unequal weight."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((12, 3)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    weights = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1], np.float32)
    arrays = {"x": x, "y": y, "weights": weights}
    return {name: array.reshape(accumulate, -1, *array.shape[1:]) for name, array in arrays.items()}


def by_hand(w, rate, seed=0):
    one = {name: array[0].astype(np.float64) for name, array in batch(1, seed).items()}
    errors = one["x"] @ w + 0.25 - one["y"]
    weight = one["weights"].sum()
    gradient = 2 * (errors * one["weights"]) @ one["x"] / weight
    loss, error = ((values * one["weights"]).sum() / weight for values in (errors**2, np.abs(errors)))
    return w - rate * gradient, loss, error, np.linalg.norm(gradient)


@pytest.mark.parametrize("accumulate", [1, 2, 4, 12])
def test_two_steps_are_what_numpy_does_with_the_whole_batch(start, accumulate):
    """Micro-batches with all, some or none of the weight: a mean of their means would be something else."""
    step, state, frozen = start
    w = np.array([1.0, -2.0, 0.5])
    for number, rate in enumerate([RATE, 0.9 * RATE]):
        state, metrics = step(state, frozen, batch(accumulate, seed=number))
        w, loss, error, norm = by_hand(w, rate, seed=number)
        assert metrics.keys() == {"loss", "error", "noise", "grad_norm", "learning_rate"}
        for name, expected in {"loss": loss, "error": error, "grad_norm": norm, "learning_rate": rate}.items():
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)
            assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(state.trainable["params"]["w"], w, rtol=1e-5)
        assert int(state.step) == number + 1
    assert step._cache_size() == 1, "compiled once"


def test_the_old_state_is_donated_and_the_frozen_part_is_not(start):
    step, state, frozen = start
    old = jax.tree.leaves(state)
    state, _ = step(state, frozen, batch(2))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, frozen)))
    assert float(frozen["params"]["bias"]) == 0.25


def compiled_by(caplog):
    return [record.message for record in caplog.records if "Finished XLA compilation of jit(step)" in record.message]


def test_it_is_compiled_while_the_caller_goes_on(start, caplog):
    step, state, frozen = start
    given = (state, frozen, jax.device_put(batch(2), sharding.replicated(one_device())))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), given)
    with caplog.at_level(logging.DEBUG, logger="jax._src.dispatch"):  # in all threads
        compiling(step, one_device(), *shapes)()
        assert len(compiled_by(caplog)) == 1
        with jax.set_mesh(one_device()):
            after, _ = step(*given)
        assert int(after.step) == 1
        assert len(compiled_by(caplog)) == 1


def test_what_cannot_be_compiled_fails_where_it_is_called():
    def step(x):
        raise ValueError("no such step")

    wait = compiling(jax.jit(step), one_device(), jax.ShapeDtypeStruct((2,), jnp.float32))
    wait()
    with pytest.raises(ValueError, match="no such step"):
        jax.jit(step)(jnp.zeros(2))


def test_randomness_follows_from_seed_step_and_micro_batch(start):
    step, state, frozen = start
    expected = [
        np.mean([jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), n), i)) for i in range(2)])
        for n in range(2)
    ]
    for value in expected:
        state, metrics = step(state, frozen, batch(2))
        np.testing.assert_allclose(metrics["noise"], value, rtol=1e-6)
    assert expected[0] != expected[1]


def test_a_batch_without_weight_changes_nothing(start):
    step, state, frozen = start
    before = np.array(state.trainable["params"]["w"])
    empty = batch(2) | {"weights": np.zeros((2, 6), np.float32)}
    state, metrics = step(state, frozen, empty)
    np.testing.assert_array_equal(state.trainable["params"]["w"], before)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0


def test_eval_step_returns_sums(start):
    _, state, frozen = start
    one = {name: array[0] for name, array in batch(1).items()}
    loss = make_eval_step(squares)(state.trainable, frozen, one)
    _, mean, error, _ = by_hand(np.array([1.0, -2.0, 0.5]), RATE)
    np.testing.assert_allclose(loss.sum, mean * 6, rtol=1e-5)
    assert float(loss.weight) == 6
    np.testing.assert_allclose(loss.metrics["error"], (error * 6, 6), rtol=1e-5)


def test_kernels_are_cast_but_a_heads_stay_float32():
    """A score or a value of 1.001 is not 1: heads are used in float32, in training as in evaluation."""
    trainable = {
        "params": {"norm": {"scale": jnp.full(2, 1.001)}, "up_proj": {"kernel": jnp.full((2, 2), 1.001)}},
        "heads": {"value": {"kernel": jnp.full((2, 1), 1.001)}},
    }
    dtypes = {path: str(leaf.dtype) for path, leaf in tree.flatten(kernels_in(trainable, jnp.bfloat16)).items()}
    assert dtypes == {
        "heads/value/kernel": "float32",
        "params/norm/scale": "float32",
        "params/up_proj/kernel": "bfloat16",
    }
