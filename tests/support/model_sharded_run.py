"""Run by test_sharded_families.py in a process with 8 devices: loss and gradients of families on meshes, as JSON.

Arguments: names of configs of family_configs.py, after "balanced " with the losses and corrections that even out the
load of experts. Prints {config: {mesh: {"loss": relative difference, "gradient":
largest difference, "split": paths of parameters that the mesh splits}}}, all compared with one device.
"""

import json
import sys

import jax
import numpy as np

from ftjax import config as configs
from ftjax import lora, sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params, logical_axes
from ftjax.objectives.sft import make_sft
from support.family_configs import CONFIGS
from support.tiny import batch_of, documents, numpy_params

MESHES = {
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x expert=2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp=2 x context=2 x expert=2": {"fsdp": 2, "context": 2, "expert": 2},
}
# Gradients that may be, or are, zero.
SMALL = ("lora_a", "act_fn/beta", "act_fn/eps", "mlp/correction", "/layer_scalar")
# Sizes that two and four devices divide.
EVEN = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GPT2_EVEN = {"vocab_size": 64, "n_embd": 32, "n_head": 4}


def main(names):
    assert jax.device_count() == 8
    docs = documents(0, [9, 7, 12, 4, 16, 5, 6, 10, 13, 3, 8, 8])
    batch = batch_of([docs[i : i + 2] for i in range(0, 12, 2)] + [docs[:2], docs[2:4]], 24)
    out = {}
    for name in names:
        balanced = name.startswith("balanced ")
        config = CONFIGS[name.removeprefix("balanced ")]
        config = config | (EVEN if "hidden_size" in config else GPT2_EVEN)
        config |= {size: 4 for size in ("num_experts", "num_local_experts", "moe_num_experts") if size in config}
        config |= {"vocab_size_per_layer_input": 64} if "vocab_size_per_layer_input" in config else {}
        if "rope_scaling" in config and config["model_type"] == "phi3":
            config["head_dim"] = None
        if config["model_type"] == "lfm2":  # its stream grows with depth: of the last layers gradients would be tiny
            config |= {"num_hidden_layers": 3, "full_attn_idxs": [1]}
        if config["model_type"].startswith(("qwen3_5", "qwen3_next")):  # under norms of small values rounding is large
            config |= {"rms_norm_eps": 1.0}
        model = Decoder(spec_from_config(config), remat="full")
        one = sharding.make_mesh({}, jax.devices()[:1])
        loss, expected, _ = run(model, one, batch, balanced)
        out[name] = {}
        for mesh_name, sizes in MESHES.items():
            other, gradients, split = run(model, sharding.make_mesh(sizes), batch, balanced)
            differences = [np.abs(gradients[path] - expected[path]).max() for path in expected]
            out[name][mesh_name] = {
                "loss": abs(other / loss - 1),
                "gradient": float(max(differences)),
                "split": split,
            }
        # Of Gemma's narrow parts (AltUp, gates of per-layer embeddings), and behind layers that are one part alone or
        # scaled down, those of the adapters are smaller.
        families = ("gemma3n_text", "gemma4_text", "glm4_moe", "granitemoehybrid", "nemotron_h")
        families += ("qwen3_5_text", "qwen3_5_moe_text")
        small = (*SMALL, "lora_b", "lora_scale") if config["model_type"] in families else SMALL
        assert all(np.abs(leaf).max() > 1e-4 for path, leaf in expected.items() if not path.endswith(small)), name
        corrections = [leaf for path, leaf in expected.items() if path.endswith("mlp/correction")]
        assert not balanced or all(np.abs(leaf).max() > 1e-4 for leaf in corrections), name
    print(json.dumps(out))


def run(model, mesh, batch, balanced=False, targets="all-linear"):
    """(mean loss, {path: gradient}, paths that are split) on `mesh`, of all parameters and of adapters on `targets`."""
    params = abstract_params(model, mesh)
    axes = logical_axes(model)
    targets = lora.find_targets(targets, lora.linear_kernels(tree.flatten(params)))
    adapters = lora.abstract_adapters(params, axes, targets, 2, mesh)
    rng = np.random.default_rng(0)
    values = numpy_params(model)
    leaves = tree.flatten(adapters)
    made = {path: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in leaves.items()}
    variables = {"params": values, "lora": tree.unflatten(made)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": params, "lora": adapters})
    settings = configs.defaults().objective
    if balanced:
        settings.update(router_balance=0.1, router_z_loss=0.01, router_bias_rate=0.01)
    objective = make_sft(model, settings)

    @jax.jit
    def program(variables, batch):
        def total(variables):
            loss = objective(variables, batch, jax.random.key(0))
            return loss.sum / loss.weight

        return jax.value_and_grad(total)(variables)

    with jax.set_mesh(mesh):
        placed = sharding.placed(mesh, batch)
        loss, gradients = program(jax.device_put(variables, shardings), placed)
    split = [path for path, leaf in tree.flatten(shardings).items() if not leaf.is_fully_replicated]
    return float(loss), tree.flatten(jax.device_get(gradients)), split


if __name__ == "__main__":
    main(sys.argv[1:])
