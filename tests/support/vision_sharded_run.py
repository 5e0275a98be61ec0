"""Run by test_sharded_vision.py in a process with 8 devices: loss and gradients with images on meshes, as JSON.

Arguments: names of configs of vision.py. Prints {config: {mesh: {"loss": relative difference, "gradient": largest
difference, "split": paths of parameters that the mesh splits}}}, all compared with one device.
"""

import copy
import json
import sys

import jax
import numpy as np

from ftjax import sharding
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from support.model_sharded_run import run
from support.vision import CONFIGS, pictured, pictured_batch, torch_model

MESHES = {
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 x fsdp=2 x expert=2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp=2 x context=2 x tensor=2": {"fsdp": 2, "context": 2, "tensor": 2},
}
LENGTH = 96
TARGETS = "vision|_proj"


def main(names):
    assert jax.device_count() == 8
    out = {}
    for name in names:
        config = copy.deepcopy(CONFIGS[name])
        # Sizes that two and four devices divide.
        config["vision_config"] |= {
            "hidden_size": 32,
            "num_heads" if "depth" in config["vision_config"] else "num_attention_heads": 4,
        }
        model = Decoder(spec_from_config(config, vision=True), remat="full")
        batch = batch_of(config, model.spec.vision)
        loss, expected, _ = run(model, sharding.make_mesh({}, jax.devices()[:1]), batch, targets=TARGETS)
        small = [path for path, leaf in expected.items() if np.abs(leaf).max() < 1e-4]
        assert not [path for path in small if not path.endswith(("k_proj/bias", "lora_scale"))], small
        out[name] = {}
        for mesh_name, sizes in MESHES.items():
            other, gradients, split = run(model, sharding.make_mesh(sizes), batch, targets=TARGETS)
            differences = [np.abs(gradients[path] - expected[path]).max() for path in expected]
            out[name][mesh_name] = {
                "loss": abs(other / loss - 1),
                "gradient": float(max(differences)),
                "split": split,
            }
    print(json.dumps(out))


def batch_of(config, vision):
    """Eight rows: of text, of one image, of several."""
    whole = (vision.grid, vision.grid)
    sizes = [whole] * 3 if vision.grid else [(4, 6), (2, 2), (6, 8)]
    docs = [pictured(vision, sizes[: seed % 3], [9, 7, 5][: 1 + seed % 3], seed) for seed in range(12)]
    rows = [docs[i : i + 2] for i in range(0, 12, 2)] + [[docs[0]], [docs[1]]]
    return pictured_batch(torch_model(config), vision, rows, LENGTH, 144)


if __name__ == "__main__":
    main(sys.argv[1:])
