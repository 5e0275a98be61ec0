"""Schedules against transformers', optimizers against torch's, transformers' and, for Lion, NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from support.family_configs import CONFIGS
from support.tiny import OPTIMIZER, SCHEDULE, numpy_params

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.training.optim import make_optimizer, make_schedule, rate_factors


def rates(name, steps=10, peak=1.0, **changes):
    """At each step; without a warm-up, unless `changes` says so."""
    config = ConfigDict(SCHEDULE.to_dict() | {"name": name, "warmup_ratio": 0.0} | changes)
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


def of_transformers(name, warmup, steps, decay=None):
    """The rate at each step of its schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    settings = {"num_warmup_steps": warmup} | ({} if name.startswith("constant") else {"num_training_steps": steps})
    settings |= {"num_decay_steps": decay, "decay_type": "linear"} if name == "wsd" else {}
    function = getattr(transformers, f"get_{name}_schedule{'' if name == 'wsd' else '_with_warmup'}")
    schedule = function(optimizer, **settings)
    values = []
    for _ in range(steps + 1):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.array(values)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_every_step_is_that_of_transformers(name):
    """But for the warm-up: theirs begins at 0, where a step changes nothing; ours is theirs from its second step on."""
    values = rates(name, 40, warmup_steps=6, decay_ratio=0.25)
    np.testing.assert_allclose(values[6:], of_transformers(name, 6, 40, decay=10)[6:], atol=1e-6)
    np.testing.assert_allclose(values[:6], of_transformers(name, 7, 40, decay=10)[1:7], atol=1e-6)


def test_the_steps_of_the_warm_up_count_before_their_share():
    np.testing.assert_array_equal(rates("cosine", warmup_steps=4), rates("cosine", warmup_ratio=0.4))
    np.testing.assert_array_equal(rates("cosine", warmup_steps=4, warmup_ratio=0.03), rates("cosine", warmup_ratio=0.4))


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs_have_a_positive_rate(steps):
    for name in ("cosine", "wsd"):
        for warmup_ratio in (0.0, 0.03, 1.0):
            assert (rates(name, steps, warmup_ratio=warmup_ratio)[:steps] > 0).all()


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(KeyError):
        rates("exponential")


def tree_of(rng, scale=1.0):
    """A stack of two layers' matrices, a vector of each, and an embedding, float32; also what a gradient looks like."""
    shapes = {
        ("layers", "up_proj", "kernel"): (2, 6, 4),
        ("layers", "norm", "scale"): (2, 6),
        ("embed_tokens", "embedding"): (9, 6),
    }
    out = {"params": {"layers": {"up_proj": {}, "norm": {}}, "embed_tokens": {}}}
    for (*modules, name), shape in shapes.items():
        functools.reduce(dict.get, modules, out["params"])[name] = (scale * rng.standard_normal(shape)).astype(
            np.float32
        )
    return out


def leaves(params):
    """[(name, array)], each layer's on its own, as torch has them."""
    params = params["params"]
    stacked = [("kernel", params["layers"]["up_proj"]["kernel"]), ("scale", params["layers"]["norm"]["scale"])]
    apart = [(name, layer) for name, stack in stacked for layer in np.asarray(stack)]
    return [*apart, ("embedding", np.asarray(params["embed_tokens"]["embedding"]))]


def differences(make_witness, name, steps=6, rate=0.01, scale=1.0, **changes):
    """Ours against torch optimizers after some steps: the greatest difference of a parameter, for each.

    make_witness: [(name, torch parameter)] -> torch optimizers that have them all.
    """
    rng = np.random.default_rng(0)
    params = tree_of(rng)
    tensors = [(kind, torch.nn.Parameter(torch.tensor(array))) for kind, array in leaves(params)]
    witnesses = make_witness(tensors)
    optimizer = make_optimizer(
        ConfigDict(OPTIMIZER.to_dict() | {"name": name, "clip_norm": 0.0} | changes), optax.constant_schedule(rate)
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(steps):
        gradients = tree_of(rng, scale)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for (_, tensor), (_, gradient) in zip(tensors, leaves(gradients)):
            tensor.grad = torch.tensor(gradient)
        for witness in witnesses:
            witness.step()
    return {
        kind: float(np.abs(ours - theirs.detach().numpy()).max())
        for (kind, ours), (_, theirs) in zip(leaves(params), tensors)
    }


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


def test_the_state_of_adamw_is_laid_out_as_optaxs_own():
    """So that checkpoints from before there were other optimizers fit."""
    params = tree_of(np.random.default_rng(0))
    schedule = optax.constant_schedule(0.1)
    ours = make_optimizer(OPTIMIZER, schedule).init(params)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)).init(params)
    paths = [[jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)] for state in (ours, theirs)]
    assert paths[0] == paths[1]


def groups(tensors, decay):
    """torch's groups with our rule for weight decay: none of vectors."""
    return [{"params": [tensor], "weight_decay": decay if tensor.ndim > 1 else 0.0} for _, tensor in tensors]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_that_of_transformers_layer_by_layer(decay):
    """With the settings of its Trainer. Large gradients, so that the clipping counts; it is of each layer alone."""

    def witness(tensors):
        settings = {"lr": 0.01, "scale_parameter": False, "relative_step": False}
        return [transformers.Adafactor(groups(tensors, decay), **settings)]

    for name, difference in differences(witness, "adafactor", scale=30.0, weight_decay=decay).items():
        assert difference < 2e-6, name


def test_of_what_carries_a_state_only_the_kernels_have_weight_decay():
    """It alone moves what has gradients of zero."""
    params = {"params": numpy_params(Decoder(spec_from_config(CONFIGS["granitemoehybrid"])))}
    optimizer = make_optimizer(ConfigDict(OPTIMIZER.to_dict() | {"weight_decay": 0.1}), optax.constant_schedule(0.1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {path.rpartition("/mamba/")[2] for path, leaf in tree.flatten(updates).items() if np.any(leaf)}
    own = {path.rpartition("/mamba/")[2] for path in tree.flatten(params) if "/mamba/" in path}
    assert own & moved == {"in_proj/kernel", "out_proj/kernel"}
    assert own - moved >= {"A_log", "D", "dt_bias", "conv1d/weight", "conv1d/bias", "norm/scale"}


def test_lion_is_the_papers():
    """Chen et al. 2023, algorithm 2, in float64."""
    rng = np.random.default_rng(0)
    params = tree_of(rng)
    config = ConfigDict(OPTIMIZER.to_dict() | {"name": "lion", "b2": 0.99, "weight_decay": 0.1, "clip_norm": 0.0})
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state = optimizer.init(params)
    weights = [(name, np.float64(array)) for name, array in leaves(params)]
    moments = [np.zeros(array.shape) for _, array in weights]
    for _ in range(6):
        gradients = tree_of(rng)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for index, (_, gradient) in enumerate(leaves(gradients)):
            name, array = weights[index]
            direction = np.sign(0.9 * moments[index] + 0.1 * gradient) + (0.1 if name != "scale" else 0.0) * array
            weights[index] = name, array - 0.01 * direction
            moments[index] = 0.99 * moments[index] + 0.01 * np.float64(gradient)
    for (name, ours), (_, expected) in zip(leaves(params), weights):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6, err_msg=name)


def test_muon_is_torchs_for_each_layers_matrix_and_adamw_for_the_rest():
    """torch orthogonalizes in bfloat16, and with momentum that starts at 0: hence a tolerance of a hundredth of a step
    for one step, in which the direction is that of the gradient alone. Later ones: see the next test.
    """

    def witness(tensors):
        matrices = [tensor for name, tensor in tensors if name == "kernel"]
        rest = [(name, tensor) for name, tensor in tensors if name != "kernel"]
        muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(groups(rest, 0.1), lr=0.01)]

    found = differences(witness, "muon", steps=1, weight_decay=0.1)
    assert found["kernel"] < 0.01 * 0.2 * 6**0.5 * 0.02
    assert max(found["embedding"], found["scale"]) < 1e-6


def test_muon_in_float64():
    """Jordan 2024 on each layer's own matrix, with Nesterov momentum of 0.95, corrected for its start as in optax."""
    rng = np.random.default_rng(0)
    params = tree_of(rng)
    config = ConfigDict(OPTIMIZER.to_dict() | {"name": "muon", "clip_norm": 0.0})
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state = optimizer.init(params)
    weights = np.float64(params["params"]["layers"]["up_proj"]["kernel"])
    moment = np.zeros(weights.shape)
    for step in range(1, 5):
        gradients = tree_of(rng)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        gradient = np.float64(gradients["params"]["layers"]["up_proj"]["kernel"])
        moment = 0.95 * moment + 0.05 * gradient
        ahead = 0.95 * moment / (1 - 0.95 ** (step + 1)) + 0.05 * gradient / (1 - 0.95**step)
        for layer in range(2):
            x = ahead[layer] / np.linalg.norm(ahead[layer])
            for _ in range(5):
                x = 3.4445 * x - 4.775 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
            weights[layer] -= 0.01 * 0.2 * 6**0.5 * x
    np.testing.assert_allclose(params["params"]["layers"]["up_proj"]["kernel"], weights, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_first_moment_in_bfloat16_and_the_second_in_float32(name):
    config = ConfigDict(OPTIMIZER.to_dict() | {"name": name, "momentum_dtype": "bfloat16"})
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    params = tree_of(np.random.default_rng(0))
    state = optimizer.init(params)
    _, after = optimizer.update(params, state, params)
    for either in (state, after):
        dtypes = {}
        for path, leaf in jax.tree.leaves_with_path(either):
            moment = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
            dtypes.setdefault(moment[-1], set()).add(jnp.dtype(leaf.dtype).name)
        assert dtypes["mu"] == {"bfloat16"}
        assert dtypes.get("nu", {"float32"}) == {"float32"}


def test_groups_are_learning_rates_of_their_own():
    """torch's groups; decay is at the group's rate, too. The last pattern that matches counts."""
    factors = {"kernel": 0.5, "scale": 3.0, "embedding": 0.1}
    patterns = (("layers", 3.0), ("up_proj", 0.5), ("embed_tokens", 0.1))

    def witness(tensors):
        its = [group | {"lr": 0.01 * factors[name]} for group, (name, _) in zip(groups(tensors, 0.1), tensors)]
        return [torch.optim.AdamW(its)]

    for name, difference in differences(witness, "adamw", groups=patterns, weight_decay=0.1).items():
        assert difference < 2e-6, name


def test_a_group_that_matches_nothing_is_refused():
    config = ConfigDict(OPTIMIZER.to_dict() | {"groups": (("up_prj", 2.0),), "loraplus_ratio": 4.0})
    with pytest.raises(UserError, match=r"optimizer.groups='up_prj' matches no parameter"):
        rate_factors(config, ["lora/layers/up_proj/lora_b"])
    config.groups = (("up_proj", 2.0),)
    assert rate_factors(config, ["lora/layers/up_proj/lora_b", "lora/layers/up_proj/lora_a"]) == {
        "lora/layers/up_proj/lora_b": 8.0,
        "lora/layers/up_proj/lora_a": 2.0,
    }


@pytest.mark.parametrize("changes", [{}, {"groups": (("scale", 0.1),), "weight_decay": 0.05}])
def test_l2_sp_is_a_decay_to_the_start_that_spares_nothing(changes):
    """torch's AdamW, beside whose step everything is moved by rate x strength towards where it began."""
    rng = np.random.default_rng(0)
    start = params = tree_of(rng)
    config = ConfigDict(OPTIMIZER.to_dict() | {"clip_norm": 0.0, "l2_sp": 3.0} | changes)
    optimizer = make_optimizer(config, optax.constant_schedule(0.01))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    firsts = [(kind, torch.tensor(array, dtype=torch.float64)) for kind, array in leaves(start)]
    tensors = [torch.nn.Parameter(first.clone()) for _, first in firsts]
    rates = [0.001 if changes and kind == "scale" else 0.01 for kind, _ in firsts]
    decays = [0.0 if kind == "scale" else config.weight_decay for kind, _ in firsts]
    groups = [{"params": [one], "lr": rate, "weight_decay": d} for one, rate, d in zip(tensors, rates, decays)]
    witness = torch.optim.AdamW(groups)
    for _ in range(6):
        gradients = tree_of(rng)
        updates, state = update(gradients, state, params, initial=start)
        params = optax.apply_updates(params, updates)
        for tensor, (_, gradient) in zip(tensors, leaves(gradients)):
            tensor.grad = torch.tensor(gradient, dtype=torch.float64)
        pulls = [rate * 3.0 * (one.detach() - first) for one, rate, (_, first) in zip(tensors, rates, firsts)]
        witness.step()
        with torch.no_grad():
            for tensor, pull in zip(tensors, pulls):
                tensor -= pull
    for (kind, ours), theirs in zip(leaves(params), tensors):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=2e-6, err_msg=kind)
