"""Run by test_invariance.py in a process with 8 devices: trains on several meshes and prints what came out as JSON.

Every case sees the same 20 global batches of documents. Cases differ in mesh, in micro-batches per step and in whether
documents are packed two to a row or stand alone.
"""

import json
import sys

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny import SCHEDULE, batch_of, documents, spec

from ftjax import lora, sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes, random_params
from ftjax.objectives.sft import make_sft
from ftjax.optim import make_optimizer, make_schedule
from ftjax.state import abstract_state, init_state
from ftjax.step import make_step

STEPS = 20
MODEL = Decoder(spec(vocab_size=97, hidden_size=32, intermediate_size=64))
OPTIMIZER = ConfigDict({"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0})
RATES = {"lora": 2e-4, "none": 2e-5}

# name: (adapter kind, mesh sizes, devices, accumulate, packed)
CASES = {
    "lora, 1 device": ("lora", {}, 1, 1, True),
    "lora, 1 device, 4 micro-batches": ("lora", {}, 1, 4, True),
    "lora, 1 device, unpacked": ("lora", {}, 1, 1, False),
    "lora, fsdp=8": ("lora", {"fsdp": 8}, 8, 1, True),
    "lora, fsdp=8, 2 micro-batches, unpacked": ("lora", {"fsdp": 8}, 8, 2, False),
    "lora, fsdp=4 x tensor=2": ("lora", {"fsdp": 4, "tensor": 2}, 8, 1, True),
    "lora, fsdp=4 x tensor=2, 4 micro-batches, unpacked": ("lora", {"fsdp": 4, "tensor": 2}, 8, 4, False),
    "lora, data=2 x fsdp=4": ("lora", {"data": 2, "fsdp": -1}, 8, 1, True),
    "lora, data=2 x fsdp=4, 2 micro-batches": ("lora", {"data": 2, "fsdp": 4}, 8, 2, True),
    "none, 1 device": ("none", {}, 1, 1, True),
    "none, fsdp=8, 2 micro-batches": ("none", {"fsdp": 8}, 8, 2, True),
    "none, fsdp=4 x tensor=2, unpacked": ("none", {"fsdp": 4, "tensor": 2}, 8, 1, False),
}


def batches(accumulate, packed):
    """20 batches of 64 documents of 4 to 12 tokens: 32 rows of two, or 64 of one; [accumulate, rows, length]."""
    for step in range(STEPS):
        lengths = np.random.default_rng(step).integers(4, 13, 64)
        docs = documents(100 + step, lengths.tolist(), vocab=97)
        rows = [docs[i : i + 2] for i in range(0, 64, 2)] if packed else [[doc] for doc in docs]
        batch = batch_of(rows, 24 if packed else 12)
        yield {name: array.reshape(accumulate, -1, array.shape[1]) for name, array in batch.items()}


def train(kind, sizes, devices, accumulate, packed):
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    abstract_base, axes = abstract_params(MODEL, mesh), logical_axes(MODEL)
    variables = {"params": random_params(MODEL, 7, abstract_base)}
    if kind == "lora":
        targets = lora.find_targets("all-linear", [path for path in axes if path.endswith("kernel")])
        adapters = lora.abstract_adapters(abstract_base, axes, targets, rank=8, mesh=mesh)
        variables["lora"] = lora.init_adapters(adapters, 11, lora.scale(8, 16, False))
    trainable, frozen = tree.partition(variables, lambda path: kind == "none" or bool(lora.TRAINABLE.match(path)))
    base = jax.tree.map(np.array, frozen)
    schedule = make_schedule(RATES[kind], SCHEDULE, STEPS)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    abstract = abstract_state(optimizer, trainable, mesh)
    state = init_state(optimizer, trainable, abstract)
    start = {path: np.array(leaf) for path, leaf in tree.flatten(trainable).items()}
    first = jax.tree.leaves(state)
    step = make_step(make_sft(MODEL), optimizer, schedule, abstract, seed=0)
    losses = []
    with jax.set_mesh(mesh):
        for batch in batches(accumulate, packed):
            state, metrics = step(
                state, frozen, {n: sharding.place(mesh, (None, "batch", "length"), a) for n, a in batch.items()}
            )
            losses.append(float(metrics["loss"]))
    facts = {
        "compilations": step._cache_size(),
        "old buffers deleted": all(leaf.is_deleted() for leaf in first),
        "state where planned": jax.tree.map(lambda leaf: leaf.sharding, (state))
        == jax.tree.map(lambda leaf: leaf.sharding, abstract),
        "base unchanged": jax.tree.all(jax.tree.map(np.array_equal, base, frozen)),
        "specs": {
            path: spec_of(leaf) for path, leaf in tree.flatten({"frozen": frozen, "trainable": state.trainable}).items()
        },
        "bytes": {path: leaf.addressable_shards[0].data.nbytes for path, leaf in tree.flatten(frozen).items()},
        "moments": moments(state),
    }
    return losses, start, {path: np.array(leaf) for path, leaf in tree.flatten(state.trainable).items()}, facts


def spec_of(leaf):
    return [list(entry) if isinstance(entry, tuple) else entry for entry in leaf.sharding.spec]


def moments(state):
    """{path: specs of its Adam moments}"""
    adam = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    return {path: [spec_of(leaf), spec_of(tree.flatten(adam.nu)[path])] for path, leaf in tree.flatten(adam.mu).items()}


def main():
    references, out = {}, {}
    for name, (kind, *rest) in CASES.items():
        losses, start, final, facts = train(kind, *rest)
        reference_losses, reference = references.setdefault(kind, (losses, final))
        out[name] = facts | {
            "losses": losses,
            "loss difference": max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses)),
            "parameter difference": max(float(np.abs(final[path] - reference[path]).max()) for path in reference),
            "movement": {path: float(np.abs(final[path] - start[path]).max()) for path in final},
        }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
