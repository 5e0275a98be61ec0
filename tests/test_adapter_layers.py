"""Adapters of chosen layers: the others have none, do not change, are not counted. With peft: test_peft_kinds.py."""

import jax
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.tiny import batch_of, documents, numpy_params, one_device, spec

from ftjax import assemble, lora, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.objectives.sft import make_sft

MODEL = Decoder(spec(num_hidden_layers=3))


def config_of(**changes):
    config = configs.defaults()
    config.model.source = "x"
    config.data.batch_size = config.accumulate = 1
    config.adapter.update({"rank": 4, "targets": "q_proj,up_proj"} | changes)
    configs.validate(config, data=False)
    return config


@pytest.mark.parametrize(("text", "numbers"), [("0-2,5", {0, 1, 2, 5}), ("3", {3}), ("1,4-5", {1, 4, 5})])
def test_layers_are_numbers_and_ranges(text, numbers):
    assert lora.layer_numbers(text, 6) == numbers
    assert lora.layers_as_text(numbers) == text
    assert lora.layer_numbers("", 6) == set(range(6))


@pytest.mark.parametrize("text", ["0:2", "5-3", "-1", "1,", "1-2-3", "all"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(UserError, match=r"adapter.layers=.* numbers and ranges of layers, such as '0-7,20'"):
        config_of(layers=text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": "1-3"}, "the model has the layers 0 to 2, and no 3"),
        ({"layers": "1", "targets": "q_proj,embed_tokens"}, "embed_tokens/embedding is in no layer; leave it out"),
    ],
)
def test_layers_that_do_not_fit_the_model_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        assemble.abstract_variables(config_of(**settings), MODEL, one_device())


def test_a_stack_without_a_chosen_layer_has_no_adapters():
    model = Decoder(spec_from_config(CONFIGS["qwen3_moe, a dense layer first"]))
    variables, _ = assemble.abstract_variables(config_of(layers="1-2", targets="q_proj"), model, one_device())
    assert [path.split("/")[1] for path in tree.flatten(variables["lora"])] == ["sparse_1"] * 3
    with pytest.raises(UserError, match=r"none of adapter\.targets is in these layers"):
        assemble.abstract_variables(config_of(layers="1", targets="dense_0/mlp"), model, one_device())


def test_the_count_of_trained_parameters_is_that_of_the_chosen_layers():
    config, mesh = config_of(layers="0,2", kind="dora"), one_device()
    counts = [assemble.program(each, MODEL, mesh, 1).trained_count for each in (config, config_of(kind="dora"))]
    of_layer = 4 * (32 + 32) + 32 + 4 * (32 + 48) + 48  # A, B and the magnitude of q_proj and up_proj
    assert counts == [2 * of_layer, 3 * of_layer]


@pytest.mark.parametrize("settings", [{"kind": "dora"}, {"init": "pissa"}])
def test_other_layers_have_no_gradient_and_do_not_change(settings):
    config, params = config_of(layers="1", **settings), numpy_params(MODEL)
    abstract, is_trained = assemble.abstract_variables(config, MODEL, one_device())
    adapters = lora.init_adapters(abstract["lora"], 0, 2.0)
    adapters = lora.only_in_layers(adapters, {f"layers/{m}": [0, 1, 0] for m in ("self_attn/q_proj", "mlp/up_proj")})
    base = jax.tree.map(jax.numpy.asarray, params)
    if "init" in settings:
        base, adapters = lora.pissa(jax.device_put(base, one_device().devices.flat[0]), adapters)
    adapters = lora.with_magnitudes(lambda module: tree.flatten(base)[f"{module}/kernel"], adapters)
    leaves = tree.flatten(adapters)
    for path in leaves:  # in the chosen layer only, as training moves it
        if path.endswith(("lora_b", "lora_magnitude")):
            leaves[path] = leaves[path].at[1].add(0.1)
    trained, frozen = tree.partition({"params": base, "lora": tree.unflatten(leaves)}, is_trained)
    batch = batch_of([documents(0, [12])], 12)
    objective = make_sft(MODEL)
    gradients = jax.jit(jax.grad(lambda trained: objective(tree.combine(trained, frozen), batch, None).sum))(trained)
    for path, gradient in tree.flatten(gradients).items():
        assert np.asarray(gradient)[1].any(), path
        assert not np.asarray(gradient)[[0, 2]].any(), path
    merged = tree.flatten(lora.merge(base, tree.unflatten(leaves)))
    for path, before in tree.flatten(params).items():
        adapted = path in ("layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel")
        others = [0, 2] if adapted else slice(None)
        np.testing.assert_array_equal(np.asarray(merged[path])[others], before[others], err_msg=path)
        assert not adapted or np.abs(np.asarray(merged[path])[1] - before[1]).max() > 1e-3
