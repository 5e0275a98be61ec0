"""The MLP of a rematerialized layer in blocks of tokens: the same numbers as all at once, and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import batch_of, documents, numpy_params, one_device, spec

from ftjax import lora, tree
from ftjax.models import decoder
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes
from ftjax.objectives.sft import make_sft

LENGTH, BLOCK = 24, 8
WHOLE, IN_BLOCKS = (Decoder(spec(), remat=remat) for remat in ("none", "full"))


@pytest.fixture(scope="module")
def adapted():
    """Variables with adapters that do something, and dropout, on every linear layer."""
    mesh, axes = one_device(), logical_axes(WHOLE)
    found = lora.find_targets("all-linear", lora.adaptable(axes))
    abstract = lora.abstract_adapters(abstract_params(WHOLE, mesh), axes, found, 4, mesh, ["dropout"])
    adapters = tree.flatten(lora.init_adapters(abstract, 3, 1.0, 0.3))
    rng = np.random.default_rng(0)
    for path in [path for path in adapters if path.endswith("lora_b")]:
        adapters[path] = jnp.asarray(0.3 * rng.standard_normal(adapters[path].shape), jnp.float32)
    return jax.tree.map(jnp.asarray, numpy_params(WHOLE)), tree.unflatten(adapters)


def in_blocks(model, params, adapters, batch):
    """(loss, gradients of the adapters), and how many loops over blocks the program has."""

    def loss(adapters):
        return make_sft(model)({"params": params, "lora": adapters}, batch, jax.random.key(1)).sum

    run = jax.jit(jax.value_and_grad(loss, allow_int=True))
    loops = str(jax.make_jaxpr(loss)(adapters)).count(f"length={LENGTH // BLOCK}\n")
    return run(adapters), loops


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_blocks_change_neither_loss_nor_gradients_nor_what_dropout_drops(adapted, rows, monkeypatch, record_figure):
    monkeypatch.setattr(decoder, "MLP_BLOCK", BLOCK)
    batch = batch_of([[document] for document in documents(2, [LENGTH] * rows)], LENGTH)
    (expected, wanted), none = in_blocks(WHOLE, *adapted, batch)
    (loss, found), some = in_blocks(IN_BLOCKS, *adapted, batch)
    assert none == 0
    assert some > 0, "one of them is in blocks"
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    wanted, found = tree.flatten(wanted), tree.flatten(found)
    worst = max(np.abs(found[path] - leaf).max() for path, leaf in wanted.items())
    record_figure("largest error of a gradient", worst)
    assert max(np.abs(leaf).max() for leaf in wanted.values()) > 0.5
    assert worst < 2e-5


def test_without_adapters_the_mlp_stays_whole(adapted, monkeypatch):
    """Then its kernels are trained, and their gradients are summed at once."""
    monkeypatch.setattr(decoder, "MLP_BLOCK", BLOCK)
    batch = batch_of([[document] for document in documents(2, [LENGTH])], LENGTH)
    _, loops = in_blocks(IN_BLOCKS, adapted[0], {}, batch)
    assert loops == 0
