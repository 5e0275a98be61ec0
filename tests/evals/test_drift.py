"""How far weights moved, layer by layer, against NumPy over merged weights."""

import jax
import numpy as np
import pytest
from support.tiny import numpy_params, one_device, spec

from ftjax import lora, quant, tree
from ftjax.evals.drift import drift
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes

MODULE = "layers/mlp/up_proj"


def adapters(model, extras=()):
    kernels = ["layers/mlp/up_proj/kernel", "layers/self_attn/q_proj/kernel"]
    abstract = lora.abstract_adapters(
        abstract_params(model, one_device()), logical_axes(model), kernels, 2, one_device(), extras
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.abs(rng.standard_normal(leaf.shape)).astype(np.float32), abstract)


def expected(model, before, after):
    """{layer: ||after - before|| / ||before||} of whole parameter trees, float64."""
    squares = np.zeros((2, model.spec.num_hidden_layers))
    for path, leaf in tree.flatten(before).items():
        if path.startswith("layers/"):
            its, others = (np.asarray(x, np.float64).reshape(len(leaf), -1) for x in (leaf, tree.flatten(after)[path]))
            squares += [((others - its) ** 2).sum(1), (its**2).sum(1)]
    return dict(enumerate(np.sqrt(squares[0] / squares[1])))


def test_adapters_count_as_what_they_add_to_the_weights():
    model = Decoder(spec())
    params, adapted = numpy_params(model), adapters(model, ("magnitude",))
    layers, outside = drift(model.spec, {"params": params, "lora": adapted}, {"params": params})
    assert layers == pytest.approx(expected(model, params, lora.merge(params, adapted)), rel=1e-5)
    assert min(layers.values()) > 0.1
    assert set(outside.values()) == {0}


def test_full_fine_tuning_moves_what_is_outside_the_layers_too():
    model = Decoder(spec())
    params = numpy_params(model)
    moved = jax.tree.map(lambda leaf: leaf * np.float32(1.25), params)
    layers, outside = drift(model.spec, {"params": moved}, {"params": params})
    assert [*layers.values(), *outside.values()] == pytest.approx([0.25] * 4)
    assert outside.keys() == {"embed_tokens", "norm"}


def test_a_quantized_base_counts_as_what_it_stands_for():
    model = Decoder(spec())
    params, adapted = numpy_params(model), adapters(model)
    leaves = tree.flatten(params)
    kernel = leaves.pop(f"{MODULE}/kernel")
    packed = jax.vmap(lambda layer: quant.quantize(layer, "int8"))(kernel)
    variables = {"params": tree.unflatten(leaves), "quant": tree.unflatten({MODULE: packed})}
    leaves[f"{MODULE}/kernel"] = np.asarray(quant.dequantize(packed, np.float32))
    whole = tree.unflatten(leaves)
    layers, _ = drift(model.spec, variables | {"lora": adapted}, variables)
    assert layers == pytest.approx(expected(model, whole, lora.merge(whole, adapted)), rel=1e-5)
