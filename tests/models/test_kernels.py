"""The kernels of models/kernels.py against models/attention.py: the Pallas one interpreted on a CPU.

That it compiles for TPUs is tested where libtpu is installed; cuDNN's needs a GPU, here only what it refuses is tested.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax.sharding import AbstractDevice, AbstractMesh
from support import PYTHONPATH, SUPPORT, xla_flags
from support.tiny import spec

from ftjax import sharding
from ftjax.models import cudnn, splash
from ftjax.models.attention import attention
from ftjax.models.kernels import choose

B, H, K, D = 2, 4, 2, 16


def rows(length, seed=0):
    """(queries, keys, values, positions, segments): a packed row that ends in padding, and one of a single example."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((B, length, H, D)).astype(np.float32)
    keys, values = rng.standard_normal((2, B, length, K, D)).astype(np.float32)
    counts = [(length // 3, length // 2, 1), (length,)]
    positions, segments = np.zeros((2, B, length), np.int32)
    for row, lengths in enumerate(counts):
        start = 0
        for segment, count in enumerate(lengths, 1):
            positions[row, start : start + count] = np.arange(count)
            segments[row, start : start + count] = segment
            start += count
    return queries, keys, values, positions, segments


@pytest.mark.parametrize(
    ("length", "windows", "softcap", "with_sinks"),
    [
        (256, (None,), None, False),
        (200, (40,), 2.0, False),
        pytest.param(384, (None, 130, None, 40), None, True, marks=pytest.mark.slow),
    ],
    ids=["causal", "no multiple of a block, window and soft cap", "windows by layer and sinks"],
)
def test_splash_equals_xla_forward_and_backward(length, windows, softcap, with_sinks, record_figure):
    queries, keys, values, positions, segments = rows(length)
    values = values[..., : 8 if softcap else D]  # narrower than keys, as in latent attention
    sinks = np.linspace(-1, 2, H, dtype=np.float32) if with_sinks else None
    real = (segments > 0)[..., None, None]
    weights = np.random.default_rng(1).standard_normal((B, length, H, values.shape[-1])).astype(np.float32) * real
    kernels = splash.make_kernels(windows, H, length, 1, softcap, interpret=True)

    def ours(window, queries, keys, values, sinks):
        return splash.attention(kernels, queries, keys, values, segments, segments, 0.3, window, sinks)

    def theirs(window, queries, keys, values, sinks):
        places = (positions, positions, segments, segments)
        return attention(queries, keys, values, *places, 0.3, window, softcap, sinks)

    def run(function, window):
        def total(*given):
            out = function(window, *given)
            return jnp.sum(out * weights), out * real

        gradients, out = jax.jit(jax.grad(total, (0, 1, 2, 3) if with_sinks else (0, 1, 2), has_aux=True))(
            queries, keys, values, sinks
        )
        return out, *gradients

    for window in sorted(set(windows), key=str):
        if len(windows) > 1:
            window = jnp.int32(2**30 if window is None else window)
        for name, found, expected in zip(
            ("out", "queries", "keys", "values", "sinks"), run(ours, window), run(theirs, window)
        ):
            difference = np.abs(found - expected).max() / np.abs(expected).max()
            record_figure(f"window {window}: {name}, relative to the largest", difference)
            assert difference < 2e-6, (name, window)


def test_each_different_window_has_one_kernel():
    kernels = splash.make_kernels((None, 130, None, 40, 256, 1000), H, 256, 1, None)
    assert sorted(kernels) == [40, 130, 256]


def run_apart(script, **environment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH} | environment
    command = [sys.executable, "-W", "error", str(SUPPORT / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_meshes_split_heads_and_rows_and_change_nothing(record_figure):
    """Whole groups and parts of one over tensor; parts of a row over context, which see keys of the others."""
    flags = xla_flags(8, "--xla_backend_optimization_level=0")
    for name, difference in run_apart("kernels_run.py", XLA_FLAGS=flags).items():
        record_figure(name, difference)
        assert difference < 2e-6, name


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, of the extra `plan`, is not installed")
    return run_apart("tpu_run.py")


@pytest.mark.slow
def test_decoders_compile_for_tpus_with_splash(compiled):
    # Forward and two backward; twice that where layers have two windows.
    assert compiled["llama"] == {"kernel": "splash", "reason": "", "calls": 3}
    assert compiled["gemma2"] == {"kernel": "splash", "reason": "", "calls": 6}
    assert compiled["gpt_oss"]["kernel"] == "splash"
    assert compiled["gpt_oss"]["calls"] >= 6
    assert compiled["qwen3"]["calls"] == compiled["mistral"]["calls"] == 0
    assert compiled["qwen3"]["reason"] == "splash cannot serve heads of 12 dimensions, not a multiple of 8"
    assert "256 tokens in 4 parts" in compiled["mistral"]["reason"]


@pytest.mark.slow
def test_only_data_goes_from_slice_to_slice(compiled):
    places, said = compiled["slices"]
    assert places == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert "set config.mesh.data to a multiple of 2" in said


def on(platform, **sizes):
    device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    return AbstractMesh(shape, sharding.MESH_AXES, abstract_device=device)


SPEC = spec(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
HALF = jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("wanted", "mesh", "length", "name", "reason"),
    [
        ("auto", on("cpu"), 100, "xla", ""),
        ("auto", on("tpu"), 100, "splash", ""),
        ("xla", on("tpu"), 100, "xla", ""),
        ("splash", on("cpu"), 100, "xla", "splash is for tpu devices, and these are cpu"),
        ("cudnn", on("tpu"), 100, "xla", "cudnn is for gpu devices, and these are tpu"),
        ("splash", on("tpu", context=2), 512, "splash", ""),
        ("splash", on("tpu", context=2), 384, "xla", "splash cannot serve rows of 384 tokens in 2 parts"),
        ("auto", on("tpu", tensor=8), 256, "splash", ""),
    ],
)
def test_the_kernel_is_chosen_by_the_devices_of_the_mesh(wanted, mesh, length, name, reason):
    choice = choose(wanted, SPEC, HALF, length, mesh)
    assert choice.name == name
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_heads_that_fall_across_groups_stay_with_xla():
    odd = dataclasses.replace(SPEC, num_attention_heads=12, num_key_value_heads=4)
    assert choose("auto", odd, HALF, 256, on("tpu", tensor=4)).name == "splash"
    choice = choose("auto", odd, HALF, 256, on("tpu", tensor=6))
    assert choice == ("xla", "splash cannot serve 12 heads in groups of 3 over tensor=6")


def test_what_cudnn_cannot_serve_is_named(monkeypatch):
    def reason(spec=SPEC, dtype=HALF, length=256, context=1):
        return choose("auto", spec, dtype, length, on("gpu", context=context)).reason.removeprefix(
            "cudnn cannot serve "
        )

    assert reason().startswith("GPUs before NVIDIA's Ampere"), "this machine has none"
    monkeypatch.setattr(cudnn, "_capability", lambda: (8, 0))
    assert choose("auto", SPEC, HALF, 256, on("gpu")) == ("cudnn", "")
    assert reason(dtype=jnp.dtype(jnp.float32)).startswith("float32")
    assert reason(spec=dataclasses.replace(SPEC, attention_softcap=50.0)) == "soft caps"
    assert reason(spec=dataclasses.replace(SPEC, attention_sinks=True)) == "sinks"
    assert reason(spec=dataclasses.replace(SPEC, head_dim=256)).startswith("heads of 256")
    assert reason(length=255).startswith("rows of 255")
    assert reason(context=2) == "rows split over context"
    monkeypatch.setattr(cudnn, "_capability", lambda: (9, 0))
    assert reason(spec=dataclasses.replace(SPEC, head_dim=256)) == ""


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("counts", "way"), [((5, 16), 16), ((17, 2), 64), ((64, 1), 64), ((65, 3), None)])
def test_hoppers_kernel_is_told_where_documents_are_and_rows_of_too_many_get_a_mask(counts, way, window, monkeypatch):
    """The kernel itself needs a GPU; here one of NumPy's kind stands for it, that keeps to the same arguments."""
    length, rng = 160, np.random.default_rng(3)
    queries = rng.standard_normal((B, length, H, D)).astype(np.float32)
    keys, values = rng.standard_normal((2, B, length, K, D)).astype(np.float32)
    values = values[..., : D if window else 10]  # narrower than keys, as in latent attention; the kernel takes them not
    positions, segments = np.zeros((2, B, length), np.int32)
    for row, count in enumerate(counts):
        cuts = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
        segments[row] = np.searchsorted(cuts, np.arange(length), side="right") + 1
        positions[row] = np.arange(length) - np.concatenate([[0], cuts])[segments[row] - 1]
        segments[row][segments[row] == count] = 0  # the last one is padding
    used = []

    def packed(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, mask_type, sliding_window_length):
        assert mask_type is MaskType.PADDING_CAUSAL
        assert q.shape[3] == k.shape[3] == v.shape[3]
        room = q_seqlen.shape[1]
        assert q_offsets.shape == (B, room + 1)
        jax.debug.callback(lambda: used.append(room))
        places = jnp.arange(length)[None, None]
        inside = (places >= q_offsets[:, :-1, None]) & (places < (q_offsets[:, :-1] + q_seqlen)[..., None])
        own = (jnp.arange(1, room + 1)[None, :, None] * (inside & (q_seqlen >= 0)[..., None])).sum(axis=1)
        everywhere = jnp.broadcast_to(places[0], own.shape)
        return attention(q, k, v, everywhere, everywhere, own, own, 1.0, sliding_window_length)

    def dense(q, k, v, *, mask, scale, is_causal, implementation):
        jax.debug.callback(lambda: used.append(None))
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, H // K, axis=2))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, H // K, axis=2))

    monkeypatch.setattr(cudnn, "_capability", lambda: (9, 0))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.dot_product_attention", packed)
    monkeypatch.setattr(jax.nn, "dot_product_attention", dense)
    weights = rng.standard_normal((B, length, H, values.shape[-1])).astype(np.float32)

    def run(function):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(function(*x)) * weights), (0, 1, 2)))(
            queries, keys, values
        )

    places = (jnp.array(positions), jnp.array(segments))
    ours = run(lambda *x: cudnn.attention(*x, *places, 0.3, window))
    theirs = run(lambda *x: attention(*x, *(each for each in places for _ in range(2)), 0.3, window))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5), ours, theirs)
    jax.effects_barrier()
    assert set(used) == {way}
