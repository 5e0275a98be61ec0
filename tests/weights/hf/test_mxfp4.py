"""GPT-OSS's packed experts are, bit for bit, what transformers makes of them; other quantized weights are refused."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.llama_dirs import abstract, as_numpy, assert_same_bits
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.hf.mxfp4 import MXFP4Reader, dequantize
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

LAYER = "model.layers.{}.mlp.experts."
SIZES = {
    "model_type": "gpt_oss",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def packed(rng, experts: int, out: int, inner: int, scales: tuple[int, int] = (120, 130)):
    return (
        rng.integers(0, 256, (experts, out, inner // 32, 16), dtype=np.uint8),
        rng.integers(*scales, (experts, out, inner // 32), dtype=np.uint8),
    )


def theirs(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [E, in, out], by transformers."""
    return as_numpy(convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, {name: bfloat16 array}): a random GPT-OSS with its experts packed as in OpenAI's files."""
    directory = tmp_path_factory.mktemp("gpt_oss")
    fields = {name: value for name, value in SIZES.items() if name != "model_type"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **fields)).to(torch.bfloat16)
    tensors = {name: as_numpy(tensor) for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    files, expected = dict(tensors), dict(tensors)
    for layer in range(2):
        for name, out, inner in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            blocks, scales = packed(rng, 3, out, inner)
            path = LAYER.format(layer) + name
            files |= {path + "_blocks": blocks, path + "_scales": scales}
            expected[path] = theirs(blocks, scales)
            assert files.pop(path).shape == expected[path].shape
    save_file(files, directory / "model.safetensors")
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    (directory / "config.json").write_text(json.dumps(SIZES | {"quantization_config": quantized}))
    return directory, expected


def test_every_byte_and_scale_equals_transformers():
    """All scales but 255, which is NaN by the format; zeros, subnormals and overflow to infinity are among them."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 255, 16, 16))
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (1, 255, 16))
    ours = dequantize(blocks, scales)
    assert not np.isfinite(ours).all()
    assert_same_bits(ours.swapaxes(1, 2).copy(), theirs(blocks.copy(), scales.copy()))


def test_parts_equal_the_same_parts_of_the_whole(saved):
    directory, expected = saved
    reader = open_source(directory)
    name = LAYER.format(1) + "down_proj"
    assert reader.names() == set(expected)
    assert reader.shape(name) == (3, 96, 64)
    assert reader.dtype(name) == ml_dtypes.bfloat16
    for index in [(), (slice(1, 2),), (slice(0, 3), slice(32, 64)), (slice(2, 3), slice(17, 75), slice(5, 60))]:
        assert_same_bits(reader.read(name, index).copy(), expected[name][index].copy())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_model_loads(saved, dtype):
    directory, expected = saved
    reader = open_source(directory)
    spec = spec_from_config(reader.config)
    leaves = tree.flatten(load_params(reader, spec, abstract(spec, dtype)))
    for path, name in (("gate_up_proj", "gate_up_proj"), ("down_proj", "down_proj")):
        ours = leaves[f"layers/mlp/experts/{path}/kernel"]
        for layer in range(2):
            assert_same_bits(ours[layer], expected[LAYER.format(layer) + name].astype(dtype))
    head = expected["lm_head.weight"].T.astype(dtype)
    assert_same_bits(leaves["lm_head/kernel"], np.ascontiguousarray(head))


def test_a_process_reads_only_the_blocks_of_its_experts(saved, monkeypatch):
    """Expert 1 of 3, as on one device of three along the mesh axis `expert`."""
    reader = open_source(saved[0])
    assert isinstance(reader, MXFP4Reader)
    asked = []
    inner = reader._reader.read
    monkeypatch.setattr(reader._reader, "read", lambda name, index: asked.append((name, index)) or inner(name, index))
    reader.read(LAYER.format(0) + "gate_up_proj", (slice(1, 2), slice(32, 64)))
    assert [index for _, index in asked] == [(slice(1, 2), slice(None), slice(1, 2))] * 2


@pytest.fixture
def changed(saved, tmp_path):
    """`changed(tensors, config)` -> a copy of the directory with these tensors (None: removed) and config."""

    def make(tensors=None, config=None):
        stored = load_file(saved[0] / "model.safetensors") | (tensors or {})
        save_file({k: v for k, v in stored.items() if v is not None}, tmp_path / "model.safetensors")
        old = json.loads((saved[0] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(old | (config or {})))
        return tmp_path

    return make


def test_a_scale_that_stands_for_nan_is_named(changed):
    _, scales = packed(np.random.default_rng(0), 3, 192, 64)
    scales[1, 2, 0] = 255
    reader = open_source(changed({LAYER.format(1) + "gate_up_proj_scales": scales}))
    spec = spec_from_config(reader.config)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: 32 of .* values are NaN"):
        load_params(reader, spec, abstract(spec))


@pytest.mark.parametrize(
    "scales", [np.zeros((3, 192, 3), np.uint8), np.zeros((3, 192, 2), np.int8), np.zeros((3, 192, 2, 1), np.uint8)]
)
def test_scales_that_do_not_fit_the_blocks(changed, scales):
    with pytest.raises(UserError, match=r"gate_up_proj_scales \[3, 192.* are not MXFP4"):
        open_source(changed({LAYER.format(0) + "gate_up_proj_scales": scales}))


def test_blocks_without_scales_are_missing_weights(changed):
    reader = open_source(changed({LAYER.format(0) + "gate_up_proj_scales": None}))
    spec = spec_from_config(reader.config)
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.mlp\.experts\.gate_up_proj \[3, 64, 192\]"):
        load_params(reader, spec, abstract(spec))


def test_experts_both_packed_and_not(changed):
    with pytest.raises(UserError, match=r"gate_up_proj: there both in MXFP4 and otherwise"):
        open_source(changed({LAYER.format(0) + "gate_up_proj": np.zeros((3, 64, 192), np.float32)}))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "hqq", None, ["mxfp4"]])
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantized_weights_are_refused_by_name(changed, method, nested):
    config = {"quantization_config": {} if method is None else {"quant_method": method}} | {"bits": 4}
    config["quantization_config"]["bits"] = 4
    if nested:
        config = {"quantization_config": None, "text_config": config}
    with pytest.raises(UserError, match="quantized") as caught:
        open_source(changed(config=config))
    assert str(method or "of a kind that it does not name") in str(caught.value)
    assert "use the unquantized checkpoint" in str(caught.value)


def test_no_quantization_said_in_so_many_words(changed):
    assert open_source(changed(config={"quantization_config": None})).config["hidden_size"] == 64
