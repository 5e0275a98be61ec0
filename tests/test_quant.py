"""int8 and NF4 against bitsandbytes and float64 NumPy."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ftjax import quant
from ftjax.errors import UserError

SHAPES = [(64, 4), (128, 100), (576, 192), (1024, 512)]  # [in, out]


def kernel(shape, seed=0):
    """Gaussian with outliers, one channel of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * rng.uniform(0.01, 0.1, shape[1]) * (1 + 20 * (rng.random(shape) < 1e-3))
    values[:, 1] = 0
    return values.astype(np.float32)


def test_the_codes_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(quant.NF4, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(quant.dynamic_code(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_that_of_bitsandbytes(shape, record_figure):
    values = kernel(shape)
    packed, state = bnb.quantize_4bit(torch.tensor(values.T.copy()), quant_type="nf4", compress_statistics=True)
    ours = jax.device_get(quant.quantize(values, "nf4"))
    rows, columns = shape
    theirs = packed.numpy().reshape(columns, rows // 2).T
    np.testing.assert_array_equal(ours["nf4"], theirs)
    np.testing.assert_allclose(ours["absmax_scale"], state.state2.absmax.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours["absmax_offset"][0], state.offset.numpy(), rtol=1e-6)
    check_absmax(values, ours["absmax"], state, record_figure)
    # The same bits in their hands and in ours are the same weights.
    state.absmax = torch.tensor(ours["absmax"].T.reshape(-1).copy())
    state.state2.absmax, state.offset = torch.tensor(ours["absmax_scale"]), torch.tensor(ours["absmax_offset"][0])
    expected = bnb.dequantize_4bit(packed, state).numpy().T
    values = np.asarray(quant.dequantize(ours, jnp.float32))
    relative = np.abs(values - expected) / np.maximum(np.abs(expected), 1e-9)
    record_figure("largest relative difference of values", relative.max())
    np.testing.assert_allclose(values, expected, rtol=2.4e-7, atol=0)  # two units in the last place


def check_absmax(values, ours, state, record_figure):
    """Codes of the absmaxes: bitsandbytes on a CPU does not always find the nearest one; ours is never farther off."""
    columns = values.shape[1]
    theirs = state.absmax.numpy().reshape(columns, -1).T
    differ = ours != theirs
    record_figure("share of absmax codes that differ", differ.mean())
    assert differ.mean() < 0.01
    true = np.abs(values.reshape(-1, quant.BLOCK, columns)).max(axis=1).astype(np.float64)
    group = np.arange(true.size).reshape(columns, -1).T // quant.GROUP
    tensors = (state.state2.code, state.state2.absmax, state.offset)
    code, scale, offset = (tensor.numpy().astype(np.float64) for tensor in tensors)
    errors = [np.abs(code[codes] * scale[group] + offset - true)[differ] for codes in (ours, theirs)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", quant.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_arrays_have_the_shapes_that_are_told(kind, shape):
    described = quant.shapes(kind, shape, "kernel")
    made = {name: (array.shape, array.dtype) for name, array in quant.quantize(kernel(shape), kind).items()}
    assert made == described
    assert quant.axes(kind, ("embed", "mlp")).keys() == described.keys()
    assert all(len(axes) == len(described[name][0]) for name, axes in quant.axes(kind, ("embed", "mlp")).items())


def test_bytes_per_parameter(record_figure):
    for kind, most in (("nf4", 0.55), ("int8", 1.01)):
        packed = quant.quantize(kernel((4096, 512)), kind)
        assert quant.count(packed) == 4096 * 512
        stored = sum(array.nbytes for array in packed.values()) / quant.count(packed)
        record_figure(kind, stored)
        assert stored < most


def test_int8_is_the_nearest_of_255_steps(record_figure):
    values = kernel((96, 40)).astype(np.float64)
    packed = quant.quantize(values.astype(np.float32), "int8")
    step = np.abs(values).max(axis=0) / 127
    error = np.abs(np.asarray(quant.dequantize(packed, jnp.float32)) - values)
    record_figure("largest error in steps", (error[:, step > 0] / step[step > 0]).max())
    assert (error <= step / 2 + 1e-7).all()
    assert np.asarray(packed["int8"]).min() >= -127


@pytest.mark.parametrize("kind", quant.KINDS)
def test_stacked_kernels_are_each_its_own(kind):
    stack = np.stack([kernel((128, 8), seed) for seed in range(3)])
    parts = [quant.quantize(one, kind) for one in stack]
    together = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
    assert {name: array.shape for name, array in together.items()} == {
        name: shape for name, (shape, _) in quant.shapes(kind, stack.shape, "").items()
    }
    whole = quant.dequantize(together, jnp.float32)
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(whole[index], quant.dequantize(part, jnp.float32))


def test_what_the_blocks_do_not_divide_is_named():
    with pytest.raises(UserError, match=r"the 100 inputs of layers/mlp/up_proj are not a multiple of 64"):
        quant.shapes("nf4", (2, 100, 8), "layers/mlp/up_proj")
