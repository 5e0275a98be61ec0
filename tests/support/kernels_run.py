"""Run by test_kernels.py in a process with 8 devices: attention by each kernel, split over meshes, as JSON.

Prints {"KERNEL, MESH": largest difference to one device's XLA of what comes out and of the gradients, relative}. The
Pallas kernel is interpreted, which is slow: rows are as short as its blocks allow.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import sharding
from ftjax.models import kernels, splash
from ftjax.models.kernels import Choice, attend
from support.tiny import spec

ROWS, LENGTH = 2, 256
# Groups of two heads: tensor=2 splits between groups, tensor=4 has half a group on each device.
# Six groups of two over tensor=4: a device has one and a half of them.
HEADS = {"within groups": (4, 2), "across groups": (12, 6)}
CASES = {
    "within groups": [
        ("splash", {"data": 2, "tensor": 2, "context": 2}),
        ("splash", {"tensor": 4, "context": 2}),
        ("xla", {"tensor": 4, "context": 2}),
        ("xla", {"fsdp": 2, "context": 4}),
    ],
    "across groups": [("xla", {"tensor": 4, "context": 2})],
}


def differences(heads, kv_heads, cases):
    """{"KERNEL, MESH, WINDOW": difference} of `cases`."""
    decoder = dataclasses.replace(
        spec(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8),
        layer_windows=(100, None),
        attention_sinks=True,
        attention_softcap=3.0,
    )
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((ROWS, LENGTH, heads, 8)).astype(np.float32)
    keys, values = rng.standard_normal((2, ROWS, LENGTH, kv_heads, 8)).astype(np.float32)
    lengths = (150, 90, LENGTH - 240)
    segments = np.stack([np.repeat([1, 2, 3], lengths), np.repeat([1, 2, 0], lengths)]).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (ROWS, 1)).astype(np.int32)
    weights = rng.standard_normal(queries.shape).astype(np.float32) * (segments > 0)[..., None, None]
    sinks = np.linspace(-1, 1, heads, dtype=np.float32)

    def run(kernel, sizes, window):
        choice = Choice(kernel, "")

        def total(*given):
            *qkv, sinks = given
            out = attend(choice, decoder, *qkv, positions, segments, 0.4, jnp.int32(window), sinks)
            return jnp.sum(out * weights), out * weights

        mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
        with jax.set_mesh(mesh):
            # Length is split where a layer's activations are.
            placed = [
                sharding.place(mesh, ("batch", "length", name, None), x)
                for name, x in (("heads", queries), ("kv_heads", keys), ("kv_heads", values))
            ]
            gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*placed, sinks)
        return jax.device_get((out, *gradients))

    found = {}
    for window in (100, 2**30):
        expected = run("xla", {}, window)
        for kernel, sizes in cases if window == 100 else cases[:1]:
            name = f"{kernel}, {' x '.join(f'{axis}={size}' for axis, size in sizes.items())}, window {window}"
            each = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(run(kernel, sizes, window), expected)]
            found[name] = float(max(each))
    return found


def main():
    assert jax.device_count() == 8
    kernels.splash.make_kernels = functools.partial(splash.make_kernels, interpret=True)
    found = {name: differences(*counts, CASES[name]) for name, counts in HEADS.items()}
    print(json.dumps({f"{name}, {case}": value for name, cases in found.items() for case, value in cases.items()}))


if __name__ == "__main__":
    main()
