"""One of two processes that export together; see test_together.py. Arguments: its number, the port, a directory."""

import contextlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_cpu_collectives_implementation", "gloo")
NUMBER, ADDRESS, ROOT = int(sys.argv[1]), f"localhost:{sys.argv[2]}", Path(sys.argv[3])
jax.distributed.initialize(
    ADDRESS, num_processes=2, process_id=NUMBER, initialization_timeout=60, heartbeat_timeout_seconds=20
)

from ftjax import assemble, distributed, export, lora, sharding, tree  # noqa: E402
from ftjax import config as configs  # noqa: E402
from ftjax.distributed import together  # noqa: E402
from ftjax.errors import UserError  # noqa: E402
from ftjax.models.decoder import Decoder  # noqa: E402
from ftjax.models.params import abstract_params, logical_axes  # noqa: E402
from ftjax.weights.hf.together import new_directory_together  # noqa: E402
from ftjax.weights.hf.write import write_model  # noqa: E402
from ftjax.weights.peft.adapter import BaseFacts, write_adapter  # noqa: E402
from support.model_dirs import write_merged  # noqa: E402
from support.together_parts import CONFIG, RANK, adapters, card, params, save_tokenizer, spec  # noqa: E402

distributed.LIMIT_SECONDS = 60  # an error in this file must not take ten minutes to show
MESH = sharding.make_mesh({"fsdp": 4, "tensor": 2})
SPEC = spec()
outcomes = {}


def placed(leaves, abstract):
    shardings = {path: leaf.sharding for path, leaf in tree.flatten(abstract).items()}
    arrays = {
        path: jax.make_array_from_callback(leaf.shape, shardings[path], lambda index, leaf=leaf: leaf[index])
        for path, leaf in tree.flatten(leaves).items()
    }
    return tree.unflatten(arrays)


@contextlib.contextmanager
def recorded(what):
    """Keeps the error of the block, and how long it took to come."""
    start = time.monotonic()
    try:
        yield
    except (OSError, RuntimeError, UserError) as error:
        outcomes[what] = [type(error).__name__, str(error), time.monotonic() - start]


model = Decoder(SPEC)
abstract = abstract_params(model, MESH)
weights = placed(params(), abstract)
targets = lora.find_targets("all-linear", lora.linear_kernels(tree.flatten(abstract)))
abstract_lora = lora.abstract_adapters(abstract, logical_axes(model), targets, RANK, MESH)
variables = placed(adapters(), abstract_lora)
outcomes["addressable"] = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(weights))

with new_directory_together(ROOT / "model") as directory:
    write_model(directory, weights, SPEC, CONFIG, adapters=variables, dtype=jax.numpy.bfloat16, max_shard_bytes=9_000)
write_merged(ROOT / "whole", weights, SPEC, CONFIG, save_tokenizer)
write_adapter(ROOT / "adapter", variables, SPEC, BaseFacts("base", "0123"), card=card())

# The whole command, but for the run that it would load.
config = configs.defaults()
config.model.source = str(ROOT / "base")
config.model.dtype = config.model.param_dtype = "float32"
config.adapter.rank = RANK
config.data.train = ("rows.jsonl",)
base = assemble.open_base(config.model)
shapes, _ = assemble.abstract_variables(config, base.model, MESH)
with jax.set_mesh(MESH):
    run = assemble.load_variables(config, base, shapes)
    run["lora"] = jax.tree.map(lambda leaf: leaf + jax.numpy.asarray(0.05, leaf.dtype), run["lora"])
# Each process writes the same: what one finds there may not depend on the other.
(ROOT / "run").mkdir(exist_ok=True)
configs.write(config, ROOT / "run/config.json")
assemble.load_run = lambda *asked: (config, base, run, 3)
export.export_model(ROOT / "run", None, "merged", ROOT / "exported", None, "f16")

with recorded("writing fails"):

    def fails(path):
        raise OSError("the disk is full")

    write_merged(ROOT / "failed", weights, SPEC, CONFIG, fails)
with recorded("NaN"):
    bad = tree.flatten(weights) | {"norm/scale": jax.jit(lambda x: x * np.nan)(tree.flatten(weights)["norm/scale"])}
    write_merged(ROOT / "failed", tree.unflatten(bad), SPEC, CONFIG, save_tokenizer)
with recorded("the other fails"), new_directory_together(ROOT / "failed"), together("looking"):
    if NUMBER == 1:
        raise RuntimeError("cannot see it")
with recorded("one is late"), new_directory_together(ROOT / "failed"), together("looking", limit=1):
    if NUMBER == 1:
        time.sleep(3)
(ROOT / f"outcomes-{NUMBER}.json").write_text(json.dumps(outcomes))
