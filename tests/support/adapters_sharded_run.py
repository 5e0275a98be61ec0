"""Run by test_adapters_sharded.py in a process with 8 devices: adapters on meshes against one device, as JSON.

Arguments: names of CASES. Prints {case: {mesh: {"start", "loss", "gradient": differences, the loss's relative;
"split": paths that the mesh splits; "astray": adapters that do not lie as the kernel they adapt}}}.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.objectives.sft import make_sft
from support.adapted import assembled, moved
from support.family_configs import CONFIGS
from support.model_dirs import write_merged
from support.tiny import batch_of, documents, numpy_params

MESHES = {
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x expert=2": {"data": 2, "fsdp": 2, "expert": 2},
}
# Sizes that the devices and NF4's blocks divide.
EVEN = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
RANK = {"adapter.rank": 4, "adapter.alpha": 8.0}
UNTIED = {"tie_word_embeddings": False}
# name -> (family, changes of its config, config of the run)
CASES = {
    "dora with dropout": ("llama", UNTIED, {"adapter.kind": "dora", "adapter.dropout": 0.3}),
    "embedding and modules_to_save": (
        "llama",
        UNTIED,
        {"adapter.targets": "embed_tokens,q_proj", "adapter.modules_to_save": ("lm_head", "norm")},
    ),
    "pissa": ("llama", {}, {"adapter.init": "pissa"}),
    "mixtral, experts": ("mixtral", {"num_local_experts": 4}, {"adapter.targets": "experts/.*kernel|v_proj"}),
    "gpt_oss, experts": ("gpt_oss", {"num_local_experts": 4}, {"adapter.targets": "experts/.*kernel"}),
    "int8": ("llama", {}, {"quantize.base": "int8"}),
    "int8, dora": ("llama", {}, {"quantize.base": "int8", "adapter.kind": "dora"}),
    "nf4": ("llama", {}, {"quantize.base": "nf4"}),
    "nf4, experts": (
        "mixtral",
        {"num_local_experts": 4},
        {"quantize.base": "nf4", "adapter.targets": "experts/.*kernel"},
    ),
}
DOCS = documents(0, [9, 7, 12, 4, 16, 5, 6, 10, 13, 3, 8, 8])
BATCH = batch_of([DOCS[i : i + 2] for i in range(0, 12, 2)] + [DOCS[:2], DOCS[2:4]], 24)


def main(names):
    assert jax.device_count() == 8
    out = {}
    for name in names:
        family, changes, run_config = CASES[name]
        config = CONFIGS[family] | EVEN | changes
        spec = spec_from_config(config)
        with tempfile.TemporaryDirectory() as parent:
            directory = Path(parent) / "model"
            write_merged(directory, numpy_params(Decoder(spec)), spec, config, lambda directory: None)
            out[name] = compare(directory, RANK | run_config)
    print(json.dumps(out))


def compare(directory, run_config):
    single = sharding.make_mesh({}, jax.devices()[:1])
    first = assembled(directory, single, **run_config)
    start, values = jax.device_get(first.variables), jax.device_get(moved(first).variables)
    loss, expected = gradients(first, values, single)
    assert min(np.abs(leaf).max() for leaf in expected.values()) > 1e-4
    out = {}
    for mesh_name, sizes in MESHES.items():
        mesh = sharding.make_mesh(sizes)
        with jax.set_mesh(mesh):
            run = assembled(directory, mesh, **run_config)
            other, found = gradients(run, values, mesh)
        leaves = tree.flatten(run.variables)
        out[mesh_name] = {
            "start": largest(tree.flatten(start), tree.flatten(jax.device_get(run.variables))),
            "loss": abs(other / loss - 1),
            "gradient": largest(expected, found),
            "split": [path for path, leaf in leaves.items() if not leaf.sharding.is_fully_replicated],
            "astray": astray(run.model, mesh, leaves),
        }
    return out


def gradients(run, values, mesh):
    """(mean loss, {path: gradient} of what is trained) where `run` keeps its variables, at `values`."""
    placed = jax.device_put(values, jax.tree.map(lambda leaf: leaf.sharding, run.variables))
    trained, frozen = tree.partition(placed, run.is_trained)
    objective = make_sft(run.model)

    @jax.jit
    def program(trained, frozen, batch):
        def mean(trained):
            loss = objective(tree.combine(trained, frozen), batch, jax.random.key(7))
            return loss.sum / loss.weight

        return jax.value_and_grad(mean)(trained)

    with jax.set_mesh(mesh):
        batch = {key: sharding.place(mesh, ("batch", "length"), array) for key, array in BATCH.items()}
        loss, found = program(trained, frozen, batch)
    return float(loss), tree.flatten(jax.device_get(found))


def largest(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(np.float64(one[path]) - other[path]).max()) for path in one)


def astray(model, mesh, leaves):
    """What is not split as its kernel [..., in, out] is: A as the input, B and the magnitude as the output."""
    out = []
    kernels = tree.flatten(abstract_params(model, mesh))
    for path, leaf in leaves.items():
        collection, module, name = path.split("/", 1)[0], path.split("/", 1)[1].rsplit("/", 1)[0], path.rsplit("/")[-1]
        if collection != "lora":
            continue
        kernel = kernels.get(f"{module}/kernel") or kernels[f"{module}/embedding"]
        *lead, rows, columns = kernel.sharding.spec
        wanted = {"lora_a": (*lead, rows, None), "lora_b": (*lead, None, columns), "lora_magnitude": (*lead, columns)}
        wanted |= {"lora_a0": wanted["lora_a"], "lora_b0": wanted["lora_b"]}
        if tuple(leaf.sharding.spec) != wanted.get(name, tuple(lead)):
            out.append(f"{path}: {leaf.sharding.spec} beside {kernel.sharding.spec}")
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
