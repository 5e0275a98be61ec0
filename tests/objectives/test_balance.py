"""What routers do as metrics, the loss that evens it out as in transformers, and corrections that follow the load."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from support.family_configs import CONFIGS
from support.tiny import batch_of, documents, numpy_params, one_device
from support.torch_models import torch_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ftjax import config as configs
from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.models.routing import is_correction
from ftjax.objectives import balance
from ftjax.objectives.sft import make_sft
from ftjax.training.optim import with_corrections
from ftjax.training.state import TrainState
from ftjax.training.step import make_step
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

# Of one layer: of more transformers takes the product of means over all layers, and the paper of each.
MIXTRAL = CONFIGS["mixtral"] | {"num_hidden_layers": 1, "router_aux_loss_coef": 0.1}
ROUTER = "layers/mlp/router/kernel"


def settings(**changes):
    config = configs.defaults()
    config.objective.update(changes)
    return config.objective


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """(transformers' model of one layer, ours, its parameters)"""
    theirs, path = torch_model(MIXTRAL), tmp_path_factory.mktemp("mixtral")
    theirs.save_pretrained(path)
    reader = open_source(path)
    model = Decoder(spec_from_config(reader.config), remat="full")
    return theirs, model, load_params(reader, model.spec, abstract_params(model, one_device()))


def padded():
    """(a batch of two documents, each in a row of 12; its tokens and mask for torch)"""
    docs = documents(3, [12, 9])
    batch = batch_of([[doc] for doc in docs], 12)
    return batch, torch.tensor(batch["tokens"]).long(), torch.tensor(batch["segment_ids"]).long()


def test_measures_are_those_of_transformers_without_padding(mixtral, record_figure):
    theirs, model, params = mixtral
    batch, tokens, mask = padded()
    with torch.no_grad():
        logits = theirs(tokens, attention_mask=mask, output_router_logits=True).router_logits
    experts = model.spec.experts
    expected = float(load_balancing_loss_func(logits, experts.count, experts.per_token, mask))
    loss = make_sft(model, settings())({"params": params}, batch, None)
    found = {name: float(total / weight) for name, (total, weight) in loss.metrics.items()}
    record_figure("balance", abs(found["router_balance"] - expected))
    assert found["router_balance"] == pytest.approx(expected, rel=1e-5)

    real = logits[0].double().numpy().reshape(2, 12, -1)[np.asarray(mask) > 0]
    z = np.log(np.exp(real).sum(axis=-1))
    given = np.bincount(np.argsort(-real)[:, : experts.per_token].reshape(-1), minlength=experts.count)
    assert found["router_z"] == pytest.approx((z * z).mean(), rel=1e-5)
    assert found["router_load"] == pytest.approx(given.max() / given.mean(), rel=1e-6)
    assert found["router_idle"] == pytest.approx((given == 0).mean())
    assert "cross_entropy" not in found


def test_the_loss_and_its_gradients_are_those_of_transformers(mixtral, record_figure):
    theirs, model, params = mixtral
    batch, tokens, mask = padded()
    # Every token but a document's first is trained: that is what labels are for transformers.
    labels = torch.where(mask > 0, tokens, -100)
    theirs.zero_grad()
    out = theirs(tokens, attention_mask=mask, labels=labels, output_router_logits=True)
    out.loss.backward()
    batch = batch | {"weights": jnp.asarray(np.pad(np.asarray(mask)[:, 1:], [(0, 0), (0, 1)]), jnp.float32)}
    objective = make_sft(model, settings(router_balance=MIXTRAL["router_aux_loss_coef"]))

    def mean(params):
        loss = objective({"params": params}, batch, jax.random.key(0))
        return loss.sum / loss.weight, loss.metrics

    (loss, metrics), gradients = jax.value_and_grad(mean, has_aux=True)(params)
    record_figure("loss", abs(float(loss) - out.loss.item()))
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    alone = float(metrics["cross_entropy"][0] / metrics["cross_entropy"][1])
    assert alone == pytest.approx(out.loss.item() - 0.1 * out.aux_loss.item(), rel=1e-5)
    expected = theirs.model.layers[0].mlp.gate.weight.grad.numpy().T
    found = tree.flatten(gradients)[ROUTER][0]
    record_figure("gradient of the router", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_the_routers_own_loss_is_that_of_float64(mixtral):
    _, model, params = mixtral
    batch, *_ = padded()
    loss = make_sft(model, settings(router_z_loss=0.01))({"params": params}, batch, None)
    means = {name: float(total / weight) for name, (total, weight) in loss.metrics.items()}
    added = float(loss.sum / loss.weight) - means["cross_entropy"]
    assert added == pytest.approx(0.01 * means["router_z"], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_corrections_follow_the_load_of_the_whole_step(accumulate, family, remat):
    model = Decoder(spec_from_config(CONFIGS[family]), remat=remat)
    params = {"params": jax.tree.map(jnp.asarray, numpy_params(model))}
    docs = documents(1, [12, 9, 7, 10])
    batch = batch_of([[doc] for doc in docs], 12)
    (stack,) = (path for path in tree.flatten(params) if is_correction(path))
    module = stack.removeprefix("params/").removesuffix("/correction")
    _, notes = balance.hidden_and_notes(model, params, batch, None, True)
    given = np.asarray(tree.by_module(notes)[module]["given"])
    assert (given.sum(axis=-1) == 38 * model.spec.of_layers([2]).experts.per_token).all(), "padding is given to none"

    rate, objective = 1e-3, make_sft(model, settings(router_bias_rate=1e-3))
    optimizer = with_corrections(optax.sgd(0.0), rate)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jnp.asarray(leaf).sharding),
        TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {}),
    )
    step = make_step(objective, optimizer, optax.constant_schedule(0.0), abstract, seed=0)
    rows = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)
    before = {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}
    after, metrics = step(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {}), {}, rows)
    moved = {path: np.asarray(leaf) - before[path] for path, leaf in tree.flatten(after.trainable).items()}
    expected = -rate * np.sign(given - given.mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(moved.pop(stack).reshape(expected.shape), expected, atol=1e-7)
    assert (expected != 0).any()
    assert not any(leaf.any() for leaf in moved.values()), "nothing else has moved at a learning rate of 0"
    alone = make_step(make_sft(model), optimizer, optax.constant_schedule(0.0), abstract, seed=0)
    params = {"params": jax.tree.map(jnp.asarray, numpy_params(model))}
    _, plain = alone(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), {}), {}, rows)
    np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "trained", "setting", "words"),
    [
        ("llama", ["params/norm/scale"], "router_balance", r"router_balance=0\.01: this model \(llama\) is no mixture"),
        ("mixtral", ["params/norm/scale"], "router_bias_rate", "routers of a mixtral model have no corrections"),
        ("deepseek_v3", ["lora/x/lora_a"], "router_bias_rate", "set config.adapter.kind='none'"),
    ],
)
def test_settings_without_a_router_are_refused(family, trained, setting, words):
    with pytest.raises(UserError, match=words):
        balance.check(settings(**{setting: 0.01}), spec_from_config(CONFIGS[family]), trained)
