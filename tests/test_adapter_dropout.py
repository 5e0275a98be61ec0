"""Dropout of adapters: right in the mean, that of peft with the same mask, and masks that differ where they must."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from support.tiny import batch_of, documents, numpy_params, one_device, spec

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from ftjax.models.layers import Linear
from ftjax.models.params import abstract_params, logical_axes
from ftjax.objectives.sft import make_sft
from ftjax.training.state import abstract_state, init_state
from ftjax.training.step import make_eval_step, make_step

IN, OUT, RANK, SCALE, RATE = 24, 10, 4, 1.5, 0.3
LAYER = Linear(OUT, ("embed", "mlp"), jnp.float32, jnp.float32)


def one_layer(dora=False, rate=RATE):
    """(variables of LAYER, x [5, IN])"""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) * shape[0] ** -0.5, jnp.float32)

    adapter = {"lora_a": normal(IN, RANK), "lora_b": normal(RANK, OUT), "lora_scale": jnp.float32(SCALE)}
    adapter |= {"lora_dropout": jnp.float32(rate)} if rate is not None else {}
    adapter |= {"lora_magnitude": 1 + jnp.abs(normal(OUT))} if dora else {}
    return {"params": {"kernel": normal(IN, OUT)}, "lora": adapter}, normal(5, IN) * 5**0.5


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_mean_over_keys_is_the_output_without_dropout(dora, record_figure):
    """y is linear in the mask, so its mean over masks is y, and its variance is exactly r / (1 - r) sum_i (x_i M_ij)^2.

    M is what the mask goes through. Each of the 50 means over 20000 keys is then normal to a good approximation (at
    least 24 independent terms each, 20000 times): |z| < 6 but for a chance of 50 * 2e-9 = 1e-7. The mean of z^2 over
    keys is 1, with a variance of at most (kurtosis - 1) / keys, and the kurtosis is below 3 + 1 / (r (1 - r)) < 8.
    """
    variables, x = one_layer(dora)
    count = 20_000

    @jax.jit
    def moments(keys):
        outputs = jax.vmap(lambda key: LAYER.apply(variables, x, rngs={"dropout": key}))(keys)
        center = LAYER.apply(variables, x)
        return center, (outputs - center).mean(axis=0), ((outputs - center) ** 2).mean(axis=0)

    expected, mean, square = (np.float64(array) for array in moments(jax.random.split(jax.random.key(1), count)))
    adapter = jax.tree.map(np.float64, variables["lora"])
    through, kernel = SCALE * adapter["lora_a"] @ adapter["lora_b"], np.float64(variables["params"]["kernel"])
    if dora:
        factor = adapter["lora_magnitude"] / np.linalg.norm(kernel + through, axis=0)
        np.testing.assert_allclose(expected, x @ ((kernel + through) * factor), atol=1e-5)
        through = (factor - 1) * kernel + factor * through
    else:
        np.testing.assert_allclose(expected, x @ (kernel + through), atol=1e-5)
    variance = RATE / (1 - RATE) * np.square(x[:, :, None] * through).sum(axis=1)
    z = mean / np.sqrt(variance / count)
    record_figure("largest |z|", np.abs(z).max())
    assert np.abs(z).max() < 6
    record_figure("variance, relative", np.abs(square / variance - 1).max())
    assert np.abs(square / variance - 1).max() < 6 * np.sqrt(7 / count)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_with_the_same_mask_it_is_that_of_peft(dora, record_figure):
    variables, x = one_layer(dora)
    key = jax.random.key(5)
    # An adapter that hands on what is left of its input shows the mask of this key.
    numbers = {"lora_scale": jnp.float32(1), "lora_dropout": jnp.float32(RATE)}
    show = {"params": {"kernel": jnp.zeros((IN, IN))}, "lora": {"lora_a": jnp.eye(IN), "lora_b": jnp.eye(IN)} | numbers}
    layer = Linear(IN, ("embed", "mlp"), jnp.float32, jnp.float32)
    mask = np.array(layer.apply(show, jnp.ones((5, IN)), rngs={"dropout": key}))
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1) / np.float32(1 - RATE)}

    class Mask(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask)

    base = torch.nn.Linear(IN, OUT, bias=False)
    base.weight.data = torch.tensor(np.array(variables["params"]["kernel"]).T.copy())
    config = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, lora_dropout=RATE, use_dora=dora)
    layer = PeftLinear(base, "default", config, r=RANK, lora_alpha=RANK * SCALE).train()
    layer.lora_dropout["default"] = Mask()
    adapter = jax.tree.map(np.array, variables["lora"])
    layer.lora_A["default"].weight.data = torch.tensor(adapter["lora_a"].T.copy())
    layer.lora_B["default"].weight.data = torch.tensor(adapter["lora_b"].T.copy())
    if dora:
        layer.lora_magnitude_vector["default"].weight.data = torch.tensor(adapter["lora_magnitude"])
    theirs = layer(torch.tensor(np.array(x)))
    theirs.square().sum().backward()
    ours = LAYER.apply(variables, x, rngs={"dropout": key})
    record_figure("output", np.abs(ours - theirs.detach().numpy()).max())
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-5)
    assert np.abs(ours - LAYER.apply(variables, x)).max() > 0.1, "dropout does something"

    def total(adapter):
        return jnp.sum(LAYER.apply(variables | {"lora": adapter}, x, rngs={"dropout": key}) ** 2)

    gradients = jax.grad(total)(variables["lora"])
    expected = {"lora_a": layer.lora_A["default"].weight.grad.T, "lora_b": layer.lora_B["default"].weight.grad.T}
    if dora:
        expected["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight.grad
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-4, err_msg=name)


def test_without_a_key_or_a_rate_nothing_is_dropped():
    for dora in (False, True):
        variables, x = one_layer(dora)
        plain, _ = one_layer(dora, rate=None)
        zero, _ = one_layer(dora, rate=0.0)
        expected = LAYER.apply(plain, x)
        keyed = {"rngs": {"dropout": jax.random.key(0)}}
        np.testing.assert_array_equal(LAYER.apply(variables, x), expected)
        np.testing.assert_array_equal(LAYER.apply(plain, x, **keyed), expected)
        np.testing.assert_array_equal(LAYER.apply(zero, x, **keyed), expected)


MODEL = Decoder(spec(tie_word_embeddings=False))
BATCH = batch_of([[doc] for doc in documents(4, [9, 12])], 12)
WIDTH = 32


def decoder_variables(targets, rank, rate=0.5):
    mesh = one_device()
    params = numpy_params(MODEL)
    axes = logical_axes(MODEL)
    found = lora.find_targets(targets, lora.adaptable(axes))
    abstract = lora.abstract_adapters(abstract_params(MODEL, mesh), axes, found, rank, mesh, ["dropout"])
    return {"params": jax.tree.map(jnp.asarray, params), "lora": lora.init_adapters(abstract, 3, 1.0, rate)}


def test_masks_differ_by_layer_module_and_key():
    """With A the identity and one token, the rows of B's gradient that are zero are the inputs that were dropped."""
    targets = ["o_proj", "gate_proj", "up_proj", "lm_head"]
    variables = decoder_variables(targets, rank=WIDTH)
    leaves = tree.flatten(variables["lora"])
    for path in [path for path in leaves if path.endswith("lora_a")]:
        leaves[path] = jnp.broadcast_to(jnp.eye(WIDTH), leaves[path].shape)
    variables["lora"] = tree.unflatten(leaves)
    one = np.ones((1, 1), np.int32)

    @jax.jit
    def gradients(key):
        def total(adapters):
            rngs = {"dropout": key}
            with_these = variables | {"lora": adapters}
            hidden, _ = MODEL.apply(with_these, one, 0 * one, one, rngs=rngs)
            # Not at a symmetric point: every feature must have a gradient.
            return jnp.sum(jnp.sin(MODEL.apply(with_these, hidden, method=MODEL.unembed, rngs=rngs)))

        return jax.grad(total)(variables["lora"])

    def masks(key):
        out = {}
        for path, leaf in tree.flatten(jax.device_get(gradients(key))).items():
            if path.endswith("lora_b"):
                rows = np.any(leaf != 0, axis=-1).reshape(-1, WIDTH)
                out |= {(path, layer): tuple(row) for layer, row in enumerate(rows)}
        return out

    first, again, other = (masks(jax.random.key(key)) for key in (1, 1, 2))
    assert first == again
    drawn = [*first.values(), *other.values()]
    assert len(first) == 7, "three modules in two layers, and the head"
    assert len(set(drawn)) == len(drawn)
    # Of 14 * 32 inputs a half is kept, give or take 6 standard deviations.
    assert abs(np.mean(drawn) - 0.5) < 6 * 0.5 / np.sqrt(14 * WIDTH)


@pytest.fixture(scope="module")
def training():
    """(trainable with a moved B, frozen)"""
    variables = decoder_variables("all-linear", rank=4)
    leaves = tree.flatten(variables)
    rng = np.random.default_rng(0)
    for path in [path for path in leaves if path.endswith("lora_b")]:
        leaves[path] = jnp.asarray(0.3 * rng.standard_normal(leaves[path].shape), jnp.float32)
    return tree.partition(tree.unflatten(leaves), lambda path: bool(lora.TRAINABLE.match(path)))


def test_every_step_draws_its_own_masks_and_always_the_same(training):
    """With a learning rate of 0 the losses of steps differ in their masks alone."""
    trainable, frozen = training
    optimizer = optax.sgd(0.0)
    abstract = abstract_state(optimizer, trainable, one_device())
    step = make_step(make_sft(MODEL), optimizer, optax.constant_schedule(0.0), abstract, seed=0)

    def losses():
        state, out = init_state(optimizer, jax.tree.map(jnp.copy, trainable), abstract), []
        for _ in range(4):
            state, metrics = step(state, frozen, {name: array[None] for name, array in BATCH.items()})
            out.append(float(metrics["loss"]))
        return out

    found = losses()
    assert len(set(found)) == 4
    assert found == losses()


def test_an_evaluation_drops_nothing(training):
    trainable, frozen = training
    _, plain = tree.partition(frozen, lambda path: path.endswith("lora_dropout"))
    assert len(tree.flatten(plain)) < len(tree.flatten(frozen))
    evaluate = make_eval_step(make_sft(MODEL))
    assert float(evaluate(trainable, frozen, BATCH).sum) == float(evaluate(trainable, plain, BATCH).sum)


@pytest.mark.slow
def test_rematerialization_draws_the_same_masks_again(training, record_figure):
    trainable, frozen = training

    def gradients(remat):
        objective = make_sft(dataclasses.replace(MODEL, remat=remat))

        def total(trainable):
            return objective(tree.combine(trainable, frozen), BATCH, jax.random.key(2)).sum

        return jax.jit(jax.grad(total))(trainable)

    kept, again = (tree.flatten(gradients(remat)) for remat in ("none", "full"))
    record_figure("gradients", max(np.abs(kept[path] - again[path]).max() for path in kept))
    for path in kept:
        np.testing.assert_allclose(again[path], kept[path], rtol=0, atol=1e-4 * np.abs(kept[path]).max(), err_msg=path)
