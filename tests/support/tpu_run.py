"""Run by test_kernels.py: compiles attention for TPUs that are not there and prints what came out as JSON.

Needs libtpu; no device is used. Prints for each model of CASES how many Pallas kernels the compiled gradient calls or
why it has none, and where the devices of two slices stand in a mesh.
"""

import json
import os

os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.kernels import choose
from ftjax.models.params import abstract_params
from support.family_configs import CONFIGS

EVEN = {"vocab_size": 256, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {  # config, mesh, length, head_dim
    "llama": ({"fsdp": 2, "tensor": 2}, 256, 64),
    "gemma2": ({"fsdp": 2, "context": 2}, 256, 16),
    "gpt_oss": ({"fsdp": 4}, 200, 64),
    "qwen3": ({"fsdp": 4}, 256, 12),
    "mistral": ({"context": 4}, 256, 64),
}


def main():
    out = {}
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    for name, (sizes, length, head_dim) in CASES.items():
        config = CONFIGS[name] | EVEN | {"intermediate_size": 128, "head_dim": head_dim, "max_position_embeddings": 512}
        model = Decoder(spec_from_config(config), jnp.bfloat16, jnp.bfloat16)
        mesh = sharding.make_mesh(sizes, devices)
        params = abstract_params(model, mesh)
        where = sharding.named(mesh, ("batch", "length"), (4, length))
        tokens = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=where)

        def total(params, tokens, positions, segments, model=model):
            hidden, _ = model.apply({"params": params}, tokens, positions, segments)
            return hidden.astype(jnp.float32).sum()

        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(total)).lower(params, tokens, tokens, tokens).compile()
        choice = choose("auto", model.spec, model.dtype, length, mesh)
        calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        out[name] = {"kernel": choice.name, "reason": choice.reason, "calls": calls}
    out["slices"] = slices()
    print(json.dumps(out))


def slices():
    """The slice of each device of data=4 x fsdp=2 on two slices of four, and what is said to fsdp=8."""
    devices = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2).devices
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2}, devices)
    try:
        sharding.make_mesh({"fsdp": -1}, devices)
    except UserError as error:
        said = str(error)
    return [[device.slice_index for device in row.flat] for row in mesh.devices], said


if __name__ == "__main__":
    main()
