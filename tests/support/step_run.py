"""Run by test_step_dtype.py in a process with 8 devices: steps with gradients in bfloat16 and without, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.params import logical_axes
from ftjax.objectives.sft import make_sft
from ftjax.training.state import abstract_state, init_state
from ftjax.training.step import make_step
from support.tiny import batch_of, documents, numpy_params, spec

STEPS, RATE = 5, 0.05
MESHES = {"1": {}, "fsdp=8": {"fsdp": 8}, "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2}}
CASES = {
    # name: (what the model computes in, what the step keeps gradients in, mesh, micro-batches)
    **{f"bfloat16 {mesh}": (jnp.bfloat16, jnp.bfloat16, mesh, 1) for mesh in MESHES},
    "bfloat16, two parts, fsdp=8": (jnp.bfloat16, jnp.bfloat16, "fsdp=8", 2),
    "witness": (jnp.bfloat16, None, "1", 1),
    "float32": (jnp.float32, jnp.float32, "1", 1),
    "float32 witness": (jnp.float32, None, "1", 1),
}


def run(dtype, kept, mesh, count):
    """(losses, {path: float32 change of the parameters})"""
    sizes = MESHES[mesh]
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    model = Decoder(spec(vocab_size=64, tie_word_embeddings=False), dtype)
    axes = tree.flatten(logical_axes(model))
    start = tree.flatten(numpy_params(model))
    with jax.set_mesh(mesh):
        placed = {f"params/{path}": sharding.place(mesh, axes[path], leaf) for path, leaf in start.items()}
        trainable, optimizer = tree.unflatten(placed), optax.sgd(RATE)
        abstract = abstract_state(optimizer, trainable, mesh)
        step = make_step(make_sft(model), optimizer, optax.constant_schedule(RATE), abstract, 0, kept)
        state, losses = init_state(optimizer, trainable, abstract), []
        rows = batch_of([[one] for one in documents(1, [12] * 16)], 12)
        batch = {name: array.reshape(count, -1, 12) for name, array in rows.items()}
        for _ in range(STEPS):
            state, metrics = step(state, {}, batch)
            losses.append(float(metrics["loss"]))
    end = tree.flatten(jax.device_get(state.trainable))
    return losses, {path: end[f"params/{path}"] - leaf for path, leaf in start.items()}


def main():
    found = {name: run(*case) for name, case in CASES.items()}
    out = {"losses": {name: losses for name, (losses, _) in found.items()}, "changes": {}}
    _, expected = found["witness"]
    for name in CASES:
        norms = {
            path: [float(np.linalg.norm(found[name][1][path] - leaf)), float(np.linalg.norm(leaf))]
            for path, leaf in expected.items()
        }
        out["changes"][name] = {path: error / norm for path, (error, norm) in norms.items()}
    pairs = [(found["float32"][1][path], leaf) for path, leaf in found["float32 witness"][1].items()]
    out["float32 equal"] = all(np.array_equal(*pair) for pair in pairs)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
