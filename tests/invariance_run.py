"""Run by test_invariance.py in a process with 8 devices: trains on several meshes and prints what came out as JSON.

Every case sees the same 20 global batches of documents. Cases differ in mesh, in micro-batches per step and in whether
documents are packed two to a row or stand alone.
"""

import itertools
import json
import sys

import jax
import numpy as np
import optax
from ml_collections import ConfigDict
from tiny import SCHEDULE, batch_of, documents, numpy_params, spec

from ftjax import lora, sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params, logical_axes, random_params
from ftjax.objectives.sft import make_sft
from ftjax.optim import make_optimizer, make_schedule
from ftjax.state import abstract_state, init_state
from ftjax.step import make_step

STEPS = 20
MODEL = Decoder(spec(vocab_size=97, hidden_size=32, intermediate_size=64))
OPTIMIZER = ConfigDict(
    {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0, "loraplus_ratio": 1.0}
)
RATES = {"lora": 2e-4, "none": 2e-5}

MESHES = {
    "1": {},
    "fsdp=8": {"fsdp": 8},
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": -1},
    "data=2 x fsdp=4": {"data": 2, "fsdp": 4},
}

# (adapter kind, mesh, micro-batches, packed); the first case of each kind is what the others are compared with.
QUICK = [
    ("lora", "1", 1, True),
    ("lora", "1", 4, False),
    ("lora", "fsdp=8", 1, True),
    ("lora", "fsdp=4 x tensor=2", 2, False),
    ("lora", "fsdp=4 x tensor=2", 4, True),
    ("lora", "data=2 x fsdp=4", 2, True),
    ("none", "1", 1, True),
    ("none", "fsdp=4 x tensor=2", 2, False),
]
FULL = list(itertools.product(("lora", "none"), MESHES, (1, 2, 4), (True, False)))


def batches(accumulate, packed):
    """20 batches of 64 documents of 4 to 12 tokens: 32 rows of two, or 64 of one; [accumulate, rows, length]."""
    for step in range(STEPS):
        lengths = np.random.default_rng(step).integers(4, 13, 64)
        docs = documents(100 + step, lengths.tolist(), vocab=97)
        rows = [docs[i : i + 2] for i in range(0, 64, 2)] if packed else [[doc] for doc in docs]
        batch = batch_of(rows, 24 if packed else 12)
        yield {name: array.reshape(accumulate, -1, array.shape[1]) for name, array in batch.items()}


def variables_on(mesh, kind):
    """The base, whose logits are of order 1, and fresh adapters, laid out on `mesh`."""
    abstract, axes = abstract_params(MODEL, mesh), logical_axes(MODEL)
    base = tree.flatten(numpy_params(MODEL))
    variables = {"params": tree.unflatten({p: sharding.place(mesh, axes[p], leaf) for p, leaf in base.items()})}
    if kind == "lora":
        targets = lora.find_targets("all-linear", [path for path in axes if path.endswith("kernel")])
        adapters = lora.abstract_adapters(abstract, axes, targets, rank=8, mesh=mesh)
        variables["lora"] = lora.init_adapters(adapters, 11, lora.scale(8, 16, False))
    return variables


def train(kind, mesh, accumulate, packed):
    """Returns the losses, the trainable leaves before and after, and facts about the run."""
    variables = variables_on(mesh, kind)
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
            placed = {name: sharding.place(mesh, (None, "batch", "length"), leaf) for name, leaf in batch.items()}
            state, metrics = step(state, frozen, placed)
            losses.append(float(metrics["loss"]))
    adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
    trained = tree.flatten(state.trainable)
    facts = {
        "compilations": step._cache_size(),
        "old buffers deleted": all(leaf.is_deleted() for leaf in first),
        "state where planned": shardings(state) == shardings(abstract),
        "base unchanged": jax.tree.all(jax.tree.map(np.array_equal, base, frozen)),
        "batch": spec_of(placed["tokens"]),
        "frozen": {path: spec_of(leaf) for path, leaf in tree.flatten(frozen).items()},
        "shares": {
            path: leaf.size // leaf.addressable_shards[0].data.size for path, leaf in tree.flatten(frozen).items()
        },
        "trainable": {path: spec_of(leaf) for path, leaf in trained.items()},
        "first moments": {path: spec_of(leaf) for path, leaf in tree.flatten(adam.mu).items()},
        "second moments": {path: spec_of(leaf) for path, leaf in tree.flatten(adam.nu).items()},
    }
    return losses, start, {path: np.array(leaf) for path, leaf in trained.items()}, facts


def shardings(state):
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def spec_of(leaf):
    return [list(entry) if isinstance(entry, tuple) else entry for entry in leaf.sharding.spec]


def same_random_params(meshes):
    """Whether the same seed gives bit-identical parameters on every mesh."""
    first, *others = (jax.device_get(random_params(MODEL, 7, abstract_params(MODEL, mesh))) for mesh in meshes)
    return all(jax.tree.all(jax.tree.map(np.array_equal, first, other)) for other in others)


def main(cases):
    meshes = {name: sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1]) for name, sizes in MESHES.items()}
    references, out = {}, {"same random parameters": same_random_params([meshes["1"], meshes["fsdp=4 x tensor=2"]])}
    for kind, mesh, accumulate, packed in cases:
        losses, start, final, facts = train(kind, meshes[mesh], accumulate, packed)
        reference_losses, reference_start, reference = references.setdefault(kind, (losses, start, final))
        out[f"{kind}, {mesh}, {accumulate} micro-batches, {'packed' if packed else 'unpacked'}"] = facts | {
            "losses": losses,
            "loss difference": max(abs(a - b) / abs(b) for a, b in zip(losses, reference_losses)),
            "parameter difference": max(float(np.abs(final[path] - reference[path]).max()) for path in reference),
            "same start": all(np.array_equal(start[path], reference_start[path]) for path in reference_start),
            "movement": {path: float(np.abs(final[path] - start[path]).max()) for path in final},
        }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main({"quick": QUICK, "full": FULL}[sys.argv[1]])
