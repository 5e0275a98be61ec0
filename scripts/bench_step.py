"""Times the real training step on the devices of this machine: python scripts/bench_step.py [--config configs/X.py]

The model has the shapes of the config's model and random weights, made on the devices: nothing is downloaded. The
default is LoRA on Llama 3.1 8B. If that does not fit, reduce it with --layers, --batch and --length, or with any
--config.a.b=value. Prints JSON; docs/performance.md says what the figures are.
"""

import functools
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from ftjax import choices, cli, config_flag, distributed, quant, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Program
from ftjax.errors import UserError
from ftjax.memory import of_device
from ftjax.models import kernels, onednn
from ftjax.models.spec import DecoderSpec
from ftjax.plan import model_spec
from ftjax.planning import chips, compiled, flops
from ftjax.training.state import TrainState
from ftjax.tree import Tree

ROOT = Path(__file__).parent.parent

# Dense bfloat16 FLOP/s of a GPU, by the beginning of its name, from the makers' data sheets; TPUs: planning.chips.
GPU_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA B200": 2250e12,
}


def benchmark(config: ConfigDict, spec: DecoderSpec, warmup: int, steps: int, peak: float | None) -> dict:
    """Compiles and runs the step; returns the results as JSON values, times in seconds and memory in bytes.

    peak: FLOP/s of a device; None: that of its kind, of a CPU what is measured here, and no MFU if it is unknown.
    """
    mesh = sharding.make_mesh(dict(config.mesh))
    config = choices.without_data(config, spec, mesh, of_device(mesh))
    program = compiled.describe(config, spec, jax.devices())
    with jax.set_mesh(program.mesh):
        state, frozen, batch = arrays(program, config.adapter.dropout)
        started = time.perf_counter()
        step = program.step.lower(state, frozen, batch).compile()
        compile_time = time.perf_counter() - started
        for _ in range(warmup):
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(steps):  # as in training, which dispatches a step before the last one has finished
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        back_to_back = (time.perf_counter() - started) / steps
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: these figures would not be those of a training step")

    device = jax.devices()[0]
    peak = peak or peak_of(device.device_kind)
    if peak is None and device.platform == "cpu" and jax.device_count() == 1:
        peak = measured_peak(spec, program.tokens // config.accumulate, config.model)
    tokens = program.tokens
    median, count = statistics.median(times), jax.device_count()
    needed = flops.of_step(program).total
    model = program.model
    attention = kernels.choose(model.attention, spec, model.dtype, program.row_length, program.mesh, model.matmul)
    return {
        "model": config.model.source,
        "layers": spec.num_hidden_layers,
        "parameters": parameters(program),
        "trained": tree.count(program.state.trainable),
        "quantized": config.quantize.base,
        "rows": config.data.batch_size,
        "micro_batches": config.accumulate,
        "length": program.row_length,
        "remat": config.model.remat,
        "attention": attention.name + (f" ({attention.reason})" if attention.reason else ""),
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "steps": steps,
        "compile_time": compile_time,
        "step_time": {"min": min(times), "median": median, "max": max(times), "back_to_back": back_to_back},
        "tokens_per_second_per_device": tokens / median / count,
        "flops_per_step": needed,
        "peak_flops_per_device": peak,
        "mfu": needed / median / count / peak if peak else None,
        "memory": memory(step),
        "loss": loss,
        "hardware": {"device": device.device_kind, "devices": count, "processes": jax.process_count()},
        "versions": versions(device),
    }


def arrays(program: Program, dropout: float) -> tuple[TrainState, Tree, dict[str, jax.Array]]:
    """(state, frozen variables, batch) for the shapes of `program`, each array made on its own devices.

    Weights are random, because zeros need less power and so less time; the optimizer begins with zeros, as AdamW does.
    """
    rest = TrainState(program.state.step, {}, program.state.opt_state)
    zeros = filled({path: (leaf, 0.0) for path, leaf in enumerate(jax.tree.leaves(rest))})
    zeros = jax.tree.unflatten(jax.tree.structure(rest), list(zeros.values()))
    leaves = tree.flatten(tree.combine(program.state.trainable, program.frozen))
    constants = {path: (leaf, constant(path, leaf, dropout)) for path, leaf in leaves.items()}
    made = filled({path: pair for path, pair in constants.items() if pair[1] is not None})
    for number, (path, leaf) in enumerate(leaves.items()):
        if path not in made:
            key = jax.random.fold_in(jax.random.key(0), number)
            made[path] = random_like(leaf.shape, leaf.dtype, leaf.sharding)(key)
    trainable = {path: made[path] for path in tree.flatten(program.state.trainable)}
    frozen = {path: made[path] for path in tree.flatten(program.frozen)}
    state = TrainState(zeros.step, tree.unflatten(trainable), zeros.opt_state)
    return state, tree.unflatten(frozen), make_batch(program)


def parameters(program: Program) -> int:
    """The number of the base's parameters; a quantized kernel counts with its unquantized size."""
    every = tree.combine(program.state.trainable, program.frozen)
    return tree.count(every["params"]) + quant.count(every.get("quant", {}))


def constant(path: str, leaf: jax.ShapeDtypeStruct, dropout: float) -> float | None:
    """The value of all elements of a parameter; None: they are random."""
    if path.startswith("quant/"):  # the codes are random, their scales constant
        return None if jnp.issubdtype(leaf.dtype, jnp.integer) else 1e-3
    values = {"scale": 1.0, "bias": 0.0, "sinks": 0.0, "lora_b": 0.0, "lora_scale": 2.0, "lora_dropout": dropout}
    return (values | {"lora_magnitude": 1.0}).get(path.rpartition("/")[2])


def filled(wanted: dict[Any, tuple[jax.ShapeDtypeStruct, float]]) -> dict[Any, jax.Array]:
    """{path: (abstract array, value)} -> {path: array with that value}, compiled together."""

    def make():
        return {path: jnp.full(leaf.shape, value, leaf.dtype) for path, (leaf, value) in wanted.items()}

    return jax.jit(make, out_shardings={path: leaf.sharding for path, (leaf, _) in wanted.items()})()


@functools.cache
def random_like(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """A function from a PRNG key to a random parameter; a stacked one is made layer by layer, to need little memory."""

    def random(key, shape):
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
        return jax.random.normal(key, shape, dtype) * 0.02

    def make(key):
        if len(shape) < 3:
            return random(key, shape)
        return jax.lax.map(lambda key: random(key, shape[1:]), jax.random.split(key, shape[0]))

    return jax.jit(make, out_shardings=sharding)


def make_batch(program: Program) -> dict[str, jax.Array]:
    """Rows of one document each with all tokens trained on, which is what `flops_per_step` counts."""
    shape = program.batch["tokens"].shape
    rng = np.random.default_rng(0)
    ids = rng.integers(0, program.model.spec.vocab_size, (*shape[:-1], shape[-1] + 1), np.int32)
    host = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
    }
    return {
        name: jax.make_array_from_callback(shape, leaf.sharding, lambda index, name=name: host[name][index])
        for name, leaf in program.batch.items()
    }


def peak_of(kind: str) -> float | None:
    """bfloat16 FLOP/s of a device of this `device_kind`; None if it is unknown."""
    known = {chip.devices: chip.flops for chip in chips.CHIPS.values()}
    if kind in known:
        return known[kind]
    return next((peak for name, peak in GPU_PEAKS.items() if kind.startswith(name)), None)


def measured_peak(spec: DecoderSpec, tokens: int, config: ConfigDict) -> float:
    """FLOP/s of one large matrix product on this CPU, the best of several, of a micro-batch with the MLP's kernel.

    config: config.model, of the step's dtype and what multiplies in it.
    """
    dtype, multiply = jnp.dtype(config.dtype), jnp.matmul
    if config.matmul == "onednn":
        dtype, multiply = onednn.operands(), lambda left, right: onednn.product(left, right, jnp.float32)
    left = jnp.ones((tokens, spec.hidden_size), dtype)
    right = jnp.ones((spec.hidden_size, spec.intermediate_size), dtype)
    product = jax.jit(multiply).lower(left, right).compile()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        product(left, right).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * left.size * spec.intermediate_size / min(times)


def memory(step: jax.stages.Compiled) -> dict[str, int | None]:
    """Bytes on a device: the allocator's peak and limit, where the backend has them, and the compiler's figures."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    analysis = step.memory_analysis()
    peaks = [counts["peak_bytes_in_use"] for counts in stats if "peak_bytes_in_use" in counts]
    return {
        "peak": max(peaks) if peaks else None,
        "limit": stats[0].get("bytes_limit"),
        "compiled_arguments": getattr(analysis, "argument_size_in_bytes", None),
        "compiled_temporaries": getattr(analysis, "temp_size_in_bytes", None),
    }


def versions(device: jax.Device) -> dict[str, str]:
    out = {"python": platform.python_version(), "platform": str(device.client.platform_version).split("\n")[0]}
    for name in ("ftjax", "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "nvidia-cudnn-cu12"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return out | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def cut(spec: DecoderSpec, layers: int) -> DecoderSpec:
    """The model with its first layers only."""
    if not 1 <= layers <= spec.num_hidden_layers:
        raise UserError(f"--layers {layers}: the model has {spec.num_hidden_layers}")
    return spec.of_layers(range(layers))


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    with distributed.connected(flags.FLAGS):
        config = config_flag.value()
        for key, value in (("batch_size", _BATCH.value), ("max_length", _LENGTH.value)):
            if value is not None:
                config.data[key] = value
        configs.validate(config, data=False)
        spec = model_spec(config.model.source, config.model.revision)
        if _LAYERS.value is not None:
            spec = cut(spec, _LAYERS.value)
        peak = _PEAK.value * 1e12 if _PEAK.value else None
        result = benchmark(config, spec, _WARMUP.value, _STEPS.value, peak)
        if distributed.is_first():
            print(json.dumps(result, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.argv[0] = "bench_step.py"  # absl shows in --help the flags defined under this name
    distributed.define_flags()
    config_flag.define(str(ROOT / "configs/llama3_1_8b_lora.py"))
    _LAYERS = flags.DEFINE_integer("layers", None, "how many of the model's layers to keep", lower_bound=1)
    _BATCH = flags.DEFINE_integer("batch", None, "config.data.batch_size: rows over all devices", lower_bound=1)
    _LENGTH = flags.DEFINE_integer("length", None, "config.data.max_length: tokens in a row", lower_bound=2)
    _WARMUP = flags.DEFINE_integer("warmup", 3, "steps before the clock starts", lower_bound=1)
    _STEPS = flags.DEFINE_integer("steps", 20, "steps that are timed", lower_bound=1)
    _PEAK = flags.DEFINE_float("peak", None, "TFLOP/s of a device in bfloat16, where its kind is not known", 0.0)
    cli.run(main, config_flag.parse)
