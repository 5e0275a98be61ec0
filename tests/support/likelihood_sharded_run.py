"""Run by test_likelihood.py in a process with 8 devices: likelihoods and divergences on meshes, as JSON.

Prints {mesh: {"logps": ..., "divergences": ...}}, the largest differences from one device.
"""

import json

import jax
import numpy as np

from ftjax import sharding
from ftjax.evals.divergence import divergences
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params
from support.tiny import documents, numpy_params, spec

MESHES = {
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x context=2": {"data": 2, "fsdp": 2, "context": 2},
}


def main():
    assert jax.device_count() == 8
    model = Decoder(spec(vocab_size=64, max_position_embeddings=512))
    items = [Item(tokens[:2], tokens[2:]) for tokens, _ in documents(0, [5, 9, 33, 40, 12, 300], vocab=64)]
    one = found(model, items, sharding.make_mesh({}, jax.devices()[:1]))
    out = {}
    for name, sizes in MESHES.items():
        other = found(model, items, sharding.make_mesh(sizes))
        out[name] = {key: float(np.abs(other[key] - one[key]).max()) for key in one}
    print(json.dumps(out))


def found(model, items, mesh):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    base, tuned = ({"params": jax.device_put(numpy_params(model, seed), shardings)} for seed in (0, 1))
    with jax.set_mesh(mesh):
        logps = np.concatenate([its.logps for its in log_likelihoods(model, base, items)])
        return {"logps": logps, "divergences": np.concatenate(divergences(model, tuned, base, items))}


if __name__ == "__main__":
    main()
