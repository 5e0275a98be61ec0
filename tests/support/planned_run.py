"""Run by test_compiled.py in a process of its own: compiles for absent TPUs and prints what was found as JSON."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from ftjax import choices, config_files, sharding
from ftjax import config as configs
from ftjax.memory import GIB
from ftjax.plan import model_spec, plan
from ftjax.planning import compiled, hlo, table, topology, traffic
from ftjax.training.display import Display
from support.tiny import spec


def products():
    """A scan over six layers whose weights are split over four chips, and a program that is far too large."""
    slice_ = topology.parse("v5e:2x2")
    mesh = sharding.make_mesh({"fsdp": 4}, topology.devices(slice_))

    def one(x, weights):
        def body(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, sharding.replicated(mesh))
            return x, jnp.sum(x @ whole)

        return jax.lax.scan(body, x, weights)[1]

    def argument(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named(mesh, axes, shape))

    x = argument((512, 256), "batch", "width")
    weights = argument((6, 256, 512), "layers", "embed", None)
    program = jax.jit(one).trace(x, weights).lower(lowering_platforms=("tpu",)).compile()
    module = hlo.parse(program.as_text())
    found = [vars(one) for one in traffic.collectives(module, mesh) if one.kind in ("all-gather", "collective-permute")]
    huge = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32, sharding=sharding.replicated(mesh))
    lacking = None
    try:
        jax.jit(lambda x: x.sum(0)).trace(huge).lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        lacking = compiled.exceeded(str(error))
    return {
        "gather": {"ici": sum(one["ici"] for one in found), "axes": list(found[0]["axes"])},
        "flops": traffic.matrix_flops(module),
        "compiler_flops": program.cost_analysis()["flops"],
        "lacking": lacking,
    }


def slices():
    """A gradient summed over two slices of four chips, with `data` between them alone, and within them too."""
    slice_ = topology.parse("2x v5e:2x2")
    out = {}
    for name, sizes in {"between": {"data": 2, "fsdp": 4}, "within": {"data": 4, "fsdp": 2}}.items():
        mesh = sharding.make_mesh(sizes, topology.devices(slice_))

        def argument(shape, *axes, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.named(mesh, axes, shape))

        def gradient(weights, x):
            def loss(weights):
                return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0].sum()

            return jax.grad(loss)(weights)

        weights, x = argument((6, 512, 512), "layers", "embed", None), argument((64, 512), "batch", "width")
        traced = jax.jit(gradient, out_shardings=weights.sharding).trace(weights, x)
        module = hlo.parse(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
        found = [one for one in traffic.collectives(module, mesh) if one.dcn]
        out[name] = {"dcn": sum(one.dcn for one in found), "axes": sorted({axis for one in found for axis in one.axes})}
    return out


def planned(text, changes, **sizes):
    """The JSON of a plan of a small model; heads of 128, as kernels want them."""
    config = configs.defaults()
    config.model.source = "none"
    config.model.remat, config.model.dtype, config.model.param_dtype = "full", "bfloat16", "bfloat16"
    config.data.max_length, config.data.batch_size, config.accumulate = 512, 16, 1
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(config[section] if section else config, name, value)
    slice_ = topology.parse(text)
    model = spec(**({"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 32000, "head_dim": 128} | sizes))
    program = compiled.describe(config, model, topology.devices(slice_))
    report = table.as_json(config, slice_, program, compiled.plan(program, slice_))
    kept = ("flops", "collectives", "model_flops", "length", "tokens_per_second_per_chip")
    return report["memory"] | {key: report[key] for key in kept if key in report}


def rounds():
    """The plan of configs/grpo.py for Qwen2.5-0.5B on four chips, weights split over them or whole on each."""
    out = {}
    for name, flags in {"split": {}, "whole": {"mesh.data": 4, "mesh.fsdp": 1}}.items():
        config = configs.changed(config_files.load("grpo"), {"model.source": "Qwen/Qwen2.5-0.5B-Instruct", **flags})
        slice_, path = topology.parse("v5e:2x2"), Path(tempfile.mkdtemp()) / "plan.json"
        with Display(1) as display, contextlib.redirect_stdout(sys.stderr):
            status = plan(config, str(slice_), display, path)
        out[name] = json.loads(path.read_text())["writing"] | {"status": status}
    return out


def chosen():
    """Qwen2.5-0.5B with nothing set, as chosen for 16 GiB, and at once: bytes as compiled, on a chip of 31 GiB."""
    slice_ = topology.parse("v6e:1x1")
    devices, model = topology.devices(slice_), model_spec("Qwen/Qwen2.5-0.5B-Instruct")
    mesh, out = sharding.make_mesh({}, devices), {}
    for name, given in {"chosen": {}, "at once": {"accumulate": 1, "model.remat": "none"}}.items():
        config = configs.changed(configs.defaults(), {"model.source": "none"} | given)
        config = choices.without_data(config, model, mesh, 16 * GIB)
        found = compiled.plan(compiled.describe(config, model, devices), slice_)
        total = found.memory.total if found.memory else slice_.chip.usable + found.lacking
        out[name] = {"remat": config.model.remat, "accumulate": config.accumulate, "total": total}
    return out


CASES = {
    "chosen": chosen,
    "products": products,
    "ranks": lambda: {str(rank): planned("v5e:2x2", {"adapter.rank": rank}) for rank in (8, 64)},
    "vocabulary": lambda: {
        str(size): planned("v5e:2x2", {}, vocab_size=size, hidden_size=1024) for size in (32000, 256000)
    },
    "methods": lambda: {
        name: planned("v5e:2x2", {"objective.name": name, **changes})
        for name, changes in {"sft": {}, "dpo": {"data.batch_size": 8}}.items()
    },
    "references": lambda: {
        name: planned("v5e:2x2", {"adapter.kind": "none", "data.batch_size": 8, **changes})
        for name, changes in {
            "sft": {"data.batch_size": 16},
            "dpo": {"objective.name": "dpo"},
            "asked once": {"objective.name": "dpo", "objective.cache_reference": True},
        }.items()
    },
    "rewards": lambda: {
        name: planned("v5e:2x2", {"objective.name": name, **changes})
        for name, changes in {"sft": {}, "reward": {"data.batch_size": 8}}.items()
    },
    "rounds": rounds,
    "slices": slices,
}

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(CASES[sys.argv[1]]()))
