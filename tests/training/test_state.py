"""The train state: shapes, dtypes and places before and after it is made. Sharded: see test_invariance.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from support.tiny import OPTIMIZER, one_device

from ftjax import sharding, tree
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.optim import make_optimizer
from ftjax.training.state import (
    Kept,
    TrainState,
    abstract_state,
    earlier_writer,
    init_state,
    kl_controller,
    together,
    with_average,
)


def described(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)


def test_abstract_state_is_what_init_makes_and_what_an_update_keeps():
    where = sharding.replicated(one_device())
    trainable = {"lora": {"q_proj": {"lora_a": jax.device_put(jnp.ones((2, 4, 3)), where)}}}
    optimizer = make_optimizer(OPTIMIZER, optax.constant_schedule(1e-3))
    abstract = abstract_state(optimizer, trainable, one_device())
    state = init_state(optimizer, trainable, abstract)
    assert described(state) == described(abstract)
    assert int(state.step) == 0
    assert state.trainable is trainable

    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape == (2, 4, 3)]
    assert len(moments) == 2, "AdamW's two"
    gradients = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), trainable)
    _, updated = jax.eval_shape(optimizer.update, gradients, state.opt_state, trainable)
    assert [leaf.dtype for leaf in jax.tree.leaves(updated)] == [
        leaf.dtype for leaf in jax.tree.leaves(state.opt_state)
    ]


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_the_state_of_an_optimizer_comes_back_from_a_checkpoint(name, tmp_path):
    """Adafactor's is not laid out like the parameters, Muon's is of two optimizers, its momentum here in bfloat16."""
    where, dtype = sharding.replicated(one_device()), {"muon": "bfloat16", "adafactor": "float32"}[name]
    leaves = {"params/layers/up_proj/kernel": (2, 4, 3), "params/norm/scale": (4,)}
    trainable = tree.unflatten({path: jax.device_put(jnp.ones(shape), where) for path, shape in leaves.items()})
    config = ConfigDict(OPTIMIZER.to_dict() | {"name": name, "momentum_dtype": dtype})
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3))
    abstract = abstract_state(optimizer, trainable, one_device())
    state = init_state(optimizer, trainable, abstract)
    assert described(state) == described(abstract)
    _, opt_state = optimizer.update(trainable, state.opt_state, trainable)
    state = state.replace(opt_state=opt_state)
    assert described(state) == described(abstract)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(abstract)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, restored))


def test_the_average_of_what_is_trained_is_corrected_for_its_start():
    """Against float64, beside what a method keeps itself; sharded like what is trained."""
    rng, decay, where = np.random.default_rng(0), 0.9, sharding.named(one_device(), ("embed",), (5,))
    steps = [rng.standard_normal(5).astype(np.float32) for _ in range(6)]
    count = Kept(
        lambda trainable: {"count": jnp.zeros(())}, lambda kept, before, after, metrics: {"count": kept["count"] + 1}
    )
    kept = with_average(count, decay)
    trainable = {"params": {"norm": {"scale": jax.device_put(jnp.asarray(steps[0]), where)}}}
    optimizer = make_optimizer(OPTIMIZER, optax.constant_schedule(1e-3))
    abstract = abstract_state(optimizer, trainable, one_device(), kept)
    assert tree.flatten(abstract.result)["params/norm/scale"].sharding == where
    state = init_state(optimizer, trainable, abstract, kept)
    np.testing.assert_array_equal(state.result["params"]["norm"]["scale"], steps[0])
    for values in steps[1:]:
        new = {"params": {"norm": {"scale": jnp.asarray(values)}}}
        state = state.replace(trainable=new, kept=kept.update(state.kept, state.trainable, new, {}))
    weights = decay ** np.arange(4, -1, -1, dtype=np.float64)
    expected = weights @ np.float64(steps[1:]) / weights.sum()
    np.testing.assert_allclose(state.result["params"]["norm"]["scale"], expected, rtol=0, atol=1e-6)
    assert {name: float(part["count"]) for name, part in state.collections.items()} == {"kept": 5}
    alone = with_average(None, decay)
    assert not state.replace(kept=alone.init(trainable)).collections
    assert with_average(count, 0.0) is count


def test_what_is_trained_must_be_float32():
    """In bfloat16 an update of 1e-5 of a weight is lost, and Adam's second moment stalls at half its value."""
    trainable = {"params": {"norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}}}
    optimizer = make_optimizer(OPTIMIZER, optax.constant_schedule(1e-3))
    with pytest.raises(ValueError, match=r"norm/scale.*bfloat16"):
        abstract_state(optimizer, trainable, one_device())


def test_the_coefficient_of_a_kl_follows_its_target_after_each_round():
    """Ziegler et al. 2019, section 2.2, in float64; twice the target is further off than counts."""
    kept = kl_controller(0.1, target=2.0, horizon=100.0, every=2)
    value, wanted = kept.init({}), 0.1
    for step, each in enumerate([2.2, 2.2, 4.0, 4.0, 0.0, 0.0]):
        sums = {"kl": jnp.float32(8 * each), "completions": jnp.float32(8)}
        value = jax.jit(kept.update)(value, {}, {}, {"kl_coef": sums})
        if step % 2:
            wanted *= 1 + 8 / 100 * min(max(each / 2 - 1, -0.2), 0.2)
        np.testing.assert_allclose(value["kl_coef"], wanted, rtol=1e-6)


def test_a_round_is_written_by_the_weights_of_the_round_before():
    """Beside another thing that is kept; heads have no part in what is written."""
    weights = lambda value: {"lora": {"a": jnp.float32(value)}, "heads": {"value": jnp.float32(value)}}  # noqa: E731
    kept = together(earlier_writer(every=3), kl_controller(0.1, target=2.0, horizon=100.0, every=3))
    value, wrote, sums = kept.init(weights(0)), [], {"kl": jnp.float32(8), "completions": jnp.float32(8)}
    for step in range(12):  # whose weights before it are its number
        state = TrainState(jnp.int32(step), weights(step), (), value)
        if step % 3 == 0:
            wrote.append(float(state.writer["lora"]["a"]))
        value = jax.jit(kept.update)(value, weights(step), weights(step + 1), {"kl_coef": sums})
    assert wrote == [0, 0, 3, 6]
    assert state.collections["kept"].keys() == {"kl_coef", "steps_of_kl"}
    assert state.writer.keys() == {"lora"}
    assert state.replace(kept={}).writer is state.trainable
    assert together(None, None) is None
