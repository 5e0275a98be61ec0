"""The count of a model's FLOPs against products counted one by one."""

import dataclasses

import pytest
from support.family_configs import CONFIGS
from support.tiny import one_device

from ftjax import memory
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.planning import flops


def test_pairs_of_a_row_counted_one_by_one():
    for length, window, chunk in [
        *((7, None, None), (7, 3, None), (7, 7, None), (7, 100, None), (1, 1, None)),
        *((7, None, 3), (7, None, 7), (6, None, 3), (8, 2, 5), (7, None, 100)),
    ]:
        seen = [(q, k) for q in range(length) for k in range(q + 1) if chunk is None or q // chunk == k // chunk]
        pairs = sum(1 for q, k in seen if window is None or q - k < window)
        assert flops.visible_pairs(length, window, chunk) == pairs


@pytest.mark.parametrize("name", ["qwen3_moe, a dense layer first", "qwen3_moe, every second layer"])
def test_unlike_layers_are_counted_one_by_one(name):
    spec = spec_from_config(CONFIGS[name])
    spec = dataclasses.replace(spec, layer_windows=(None, 4, *(None,) * (spec.num_hidden_layers - 2)))

    def count(spec):
        variables = {"params": abstract_params(Decoder(spec), one_device())}
        return flops.count(spec, variables, lambda path: True, rows=2, length=16)

    layers = [spec.of_layers([layer]) for layer in range(spec.num_hidden_layers)]
    assert {layer.experts is None for layer in layers} == {True, False}
    whole, alone = count(spec), [count(layer) for layer in layers]
    head = 2.0 * 2 * 16 * spec.hidden_size * spec.vocab_size
    assert whole.forward - head == pytest.approx(sum(one.forward - head for one in alone))
    assert whole.attention == pytest.approx(sum(one.attention for one in alone))
    # Each layer: attention's four kernels, and three of an MLP or of the experts that a token goes to, and the router.
    for layer, one in zip(layers, alone):
        heads = 2 * (spec.num_attention_heads + spec.num_key_value_heads) * spec.head_dim * spec.hidden_size
        inner = layer.intermediate_size * (layer.experts.per_token if layer.experts else 1)
        router = layer.experts.count * spec.hidden_size if layer.experts else 0
        assert one.forward - head == pytest.approx(2 * 2 * 16 * (heads + 3 * inner * spec.hidden_size + router))
    assert memory.inner(spec) == pytest.approx(
        sum(layer.intermediate_size * (layer.experts.per_token if layer.experts else 1) for layer in layers)
        / spec.num_hidden_layers
    )


def test_layers_of_the_delta_rule_are_counted_one_by_one():
    spec = spec_from_config(CONFIGS["qwen3_5"])
    variables = {"params": abstract_params(Decoder(spec), one_device())}
    found = flops.count(spec, variables, lambda path: True, rows=2, length=16)
    # Three layers in which each of 32 tokens meets four memories [6, 10] three times; one of four heads of 12.
    assert found.attention == 3 * 32 * 4 * 3 * (2 * 6 * 10) + 2 * 2 * (2 * 136 * 4 * 12)
    mixer = 32 * (2 * 2 * 6 + 2 * 4 * 10 + 4 + 4) + 4 * 10 * 32
    attending = 32 * (2 * 4 + 2 * 2) * 12 + 4 * 12 * 32
    products = 3 * mixer + attending + 4 * 3 * 32 * 48 + 32 * 61
    assert found.forward == 2 * 32 * products


def test_layers_of_mamba_are_counted_one_by_one():
    spec = spec_from_config(CONFIGS["granitemoehybrid"])
    variables = {"params": abstract_params(Decoder(spec), one_device())}
    found = flops.count(spec, variables, lambda path: True, rows=2, length=16)
    # Two layers in which each of 32 tokens meets eight memories [6, 8] twice; one of four heads of 8.
    assert found.attention == 2 * 32 * 8 * 2 * (2 * 6 * 8) + 2 * 2 * (2 * 136 * 4 * 8)
    mixer = 32 * (2 * 64 + 2 * 2 * 6 + 8) + 64 * 32
    attending = 32 * (2 * 4 + 2 * 2) * 8
    mixture = 32 * (5 + 2 * 3 * 48 + 3 * 40)
    assert found.forward == 2 * 32 * (2 * mixer + attending + 3 * mixture + 32 * 61)


def test_attention_and_mamba_in_one_layer_are_both_counted():
    spec = spec_from_config(CONFIGS["falcon_h1"])
    found = flops.count(spec, {}, lambda path: True, rows=2, length=16)
    assert found.attention == 3 * (32 * 8 * 2 * (2 * 6 * 5) + 2 * 2 * (2 * 136 * 4 * 12))


def test_layers_of_one_part_alone():
    spec = spec_from_config(CONFIGS["nemotron_h"])
    found = flops.count(spec, {}, lambda path: True, rows=2, length=16)
    assert found.attention == 2 * (32 * 8 * 2 * (2 * 6 * 5)) + 2 * 2 * (2 * 136 * 4 * 12)
    # Two experts and the shared one in one layer of five, an MLP in another.
    assert memory.inner(spec) == (2 * 20 + 28 + 48) / 5
