"""The grouped matrix product and its gradients against a loop over groups in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models.grouped import grouped_matmul

SIZES = {
    "uneven": [5, 0, 70, 1, 24],
    "all in one": [0, 0, 100, 0, 0],
    "rows left over": [30, 10, 0, 0, 20],
    "none": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_product_and_gradients(sizes, record_figure):
    rng = np.random.default_rng(0)
    rows, kernels = rng.standard_normal((100, 6)), rng.standard_normal((5, 6, 7))
    out = rng.standard_normal((100, 7))
    ends = np.cumsum(sizes)
    expected, d_rows, d_kernels = np.zeros((100, 7)), np.zeros((100, 6)), np.zeros((5, 6, 7))
    for group, (size, end) in enumerate(zip(sizes, ends)):
        part = slice(end - size, end)
        expected[part] = rows[part] @ kernels[group]
        d_rows[part] = out[part] @ kernels[group].T
        d_kernels[group] = rows[part].T @ out[part]
    narrow = [array.astype(np.float32) for array in (rows, kernels)]
    ours, backward = jax.vjp(lambda rows, kernels: grouped_matmul(rows, kernels, jnp.asarray(sizes)), *narrow)
    ours_rows, ours_kernels = backward(out.astype(np.float32))
    used = ends[-1]  # what comes after is undefined
    pairs = [(ours[:used], expected[:used]), (ours_rows[:used], d_rows[:used]), (ours_kernels, d_kernels)]
    record_figure("difference", max(np.abs(a - b).max() for a, b in pairs if a.size))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_on_tpus_it_is_ragged_dot():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 4), (2, 4, 6))]
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    lowered = {
        platform: jax.jit(grouped_matmul).trace(*shapes, sizes).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert "ragged_dot" in lowered["tpu"]
    assert "ragged_dot" not in lowered["cpu"]
    assert "while" in lowered["cpu"]
