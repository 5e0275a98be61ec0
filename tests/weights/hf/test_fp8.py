"""Blocks of FP8 are what transformers makes of them; what does not fit is named."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.family_configs import CONFIGS
from support.llama_dirs import abstract, as_numpy, assert_same_bits
from support.torch_models import torch_model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

BLOCK = 8
QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
FIRST = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # [14, 32]: its last blocks are cut
WHOLE = "model.layers.1.mlp.experts.3.gate_proj.weight"  # [20, 32]


def packed(weight):
    """(E4M3, float32 factors of blocks), as DeepSeek's own files have them."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, {name: bfloat16 array}): a DeepSeek V3 whose layers' matrices are in FP8, but for the routers'."""
    directory = tmp_path_factory.mktemp("fp8")
    torch_model(CONFIGS["deepseek_v3"]).to(torch.bfloat16).save_pretrained(directory)
    files, expected = {}, {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        files[name], expected[name] = tensor, as_numpy(tensor)
        if name.endswith("_proj.weight") or name == FIRST:
            codes, scales = packed(tensor.float())
            files |= {name: codes, f"{name}_scale_inv": scales}
            # In float64: exact, but for the last rounding.
            factors = scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            factors = factors[: tensor.shape[0], : tensor.shape[1]]
            expected[name] = as_numpy((codes.double() * factors).float().to(torch.bfloat16))
    save_file(files, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = QUANTIZED
    (directory / "config.json").write_text(json.dumps(config))
    return directory, expected


def test_a_matrix_equals_transformers(tmp_path):
    codes, scales = packed(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    save_file({"a": codes, "a_scale_inv": scales}, tmp_path / "model.safetensors")
    config = {"model_type": "deepseek_v3", "quantization_config": QUANTIZED}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert_same_bits(open_source(tmp_path).read("a"), as_numpy(theirs))


def test_parts_equal_the_same_parts_of_the_whole(saved):
    directory, expected = saved
    reader = open_source(directory)
    assert reader.names() == set(expected)
    for name in (FIRST, WHOLE):
        assert reader.dtype(name) == ml_dtypes.bfloat16
        assert reader.shape(name) == expected[name].shape
        for index in [(), (slice(3, 5),), (slice(0, 14), slice(8, 16)), (slice(7, 13), slice(5, 27))]:
            assert_same_bits(reader.read(name, index).copy(), expected[name][index].copy())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_model_loads(saved, dtype):
    directory, expected = saved
    reader = open_source(directory)
    spec = spec_from_config(reader.config)
    leaves = tree.flatten(load_params(reader, spec, abstract(spec, dtype)))
    low = leaves["layers/dense_0/self_attn/kv_a_proj_with_mqa/kernel"][0]
    assert_same_bits(low, np.ascontiguousarray(expected[FIRST].T.astype(dtype)))
    expert = leaves["layers/sparse_1/mlp/experts/gate_proj/kernel"][0, 3]
    assert_same_bits(expert, np.ascontiguousarray(expected[WHOLE].T.astype(dtype)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{FIRST}_scale_inv": torch.ones(1, 4)}, r"kv_a_proj_with_mqa.weight_scale_inv \[1, 4\] of float32"),
        ({FIRST: torch.ones(14, 32, dtype=torch.int8)}, r"kv_a_proj_with_mqa.weight \[14, 32\] of int8"),
    ],
)
def test_factors_that_do_not_fit_are_named(saved, tmp_path, change, message):
    save_file(load_file(saved[0] / "model.safetensors") | change, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_one_factor_for_a_whole_matrix_is_refused(saved, tmp_path):
    config = json.loads((saved[0] / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved[0] / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="fp8 in blocks of None"):
        open_source(tmp_path)
