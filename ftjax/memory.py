"""Whether a step fits the memory of a device: an estimate without compiling, and what is chosen by it."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import distributed, sharding, tree
from ftjax.assemble import Program
from ftjax.errors import UserError
from ftjax.method import holds_reference_in_vain, method_of, ptx_rows
from ftjax.models import attention, kernels
from ftjax.models.delta import CHUNK
from ftjax.models.groups import stacks
from ftjax.models.spec import DecoderSpec, Delta, Mamba

GIB = 2**30
_USED = {"gpu": 0.9, "tpu": 0.9, "cpu": 0.7}  # of the memory; what is left is for the estimate's error, and others
_CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use of its machine


def of_device(mesh: Mesh) -> float | None:
    """Bytes that a program may use on each device of `mesh`; on CPUs its share of the machine. None: unknown.

    Of several processes it is the first one's, so that all choose alike.
    """
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    size = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else _of_machine()
    return json.loads(distributed.tell(json.dumps(size)))


def _of_machine() -> float:
    """The memory of this machine, or of this container, for each of its CPU devices."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        whole = min(whole, int(_CGROUP.read_text()))
    return whole / jax.local_device_count()


def choose(config: ConfigDict, program: Program, memory: float | None) -> tuple[str, int]:
    """(remat, accumulate) where the config leaves them open: the cheapest that is expected to fit `memory`, in bytes.

    More micro-batches cost less than computing layers twice, so they come first. Where nothing fits it is what needs
    least; the compiler then says by how much it is too large.

    program: of `config`, with any remat and accumulate.
    """
    rows = _divisible(config) // sharding.row_parts(program.mesh)
    remats = [config.model.remat] if config.model.remat != "auto" else ["none", "full"]
    counts = [config.accumulate] if config.accumulate else [n for n in range(1, rows + 1) if rows % n == 0]
    ways = [(remat, count) for remat in remats for count in counts]
    if memory is None:
        return ways[0]
    room = _USED[sharding.platform(program.mesh)] * memory
    return next((way for way in ways if needed(program, *way) <= room), ways[-1])


def _divisible(config: ConfigDict) -> int:
    """Rows that micro-batches must divide: those of a step, or where it has two kinds of them what divides both."""
    return math.gcd(config.data.batch_size, ptx_rows(config))


def needed(program: Program, remat: str, accumulate: int) -> float:
    """Bytes on a device while a step of `program` runs in so many micro-batches.

    Arguments, gradients, what the backward pass keeps of each layer, and where parameters are split, two whole layers.
    Fitted to what XLA allocates for SmolLM2-135M on a CPU, Qwen2.5-0.5B on a TPU and Llama 3.1 8B on a GPU, within a
    tenth of it.
    """
    mesh, spec = program.mesh.shape, program.model.spec
    trained = sum(map(bytes_on_device, jax.tree.leaves(program.state.trainable)))
    arguments = sum(map(bytes_on_device, [*jax.tree.leaves(program.state), *jax.tree.leaves(program.frozen)]))
    gradients = trained * (1 if accumulate == 1 else 2)  # and their sum over the micro-batches
    tokens = program.tokens / accumulate / sharding.row_parts(program.mesh) / mesh["context"]
    itemsize = jnp.dtype(program.model.dtype).itemsize
    width = itemsize * tokens * spec.hidden_size
    # What the backward pass keeps of a layer, in widths of the model. XLA for GPUs holds some of it twice; on CPUs what
    # activations leave is made again.
    inside = {"gpu": 5, "tpu": 3, "cpu": 3 if spec.experts else 2}[sharding.platform(program.mesh)]
    whole = 9 + inside * inner(spec) / spec.hidden_size / mesh["tensor"]
    streams = spec.altup.streams if spec.altup is not None else 1
    per_layer = {"none": whole + 3 * (streams - 1), "full": streams, "offload": 0.1 * streams}[remat]
    layers = spec.num_hidden_layers
    scores, held = _scores(program, tokens)
    carried = tokens * _carried(spec) / mesh["tensor"]
    kept = width * per_layer * layers + (held + carried) * (layers if remat == "none" else 0)
    if spec.per_layer is not None:  # parts of all layers, and what they are the sum of
        kept += 3 * itemsize * tokens * layers * spec.per_layer.width
    kept += _of_tower(program, remat, accumulate)
    return arguments + gradients + kept + width * whole + carried + 2 * scores + _gathered(program)


def _of_tower(program: Program, remat: str, accumulate: int) -> float:
    """Bytes of images and of what the vision tower keeps of them, of rows full of images. Counted, not fitted.

    Where nothing of the tower is trained, its layers keep nothing for a backward pass.
    """
    vision, mesh = program.model.spec.vision, program.mesh
    if vision is None:
        return 0.0
    *rows, colors = program.batch["patches"].shape
    patches = math.prod(rows) / accumulate / sharding.row_parts(mesh)
    width = jnp.dtype(program.model.dtype).itemsize * patches * vision.hidden_size
    inside = 9 + 3 * vision.intermediate_size / vision.hidden_size
    layers = {"none": inside, "full": 1, "offload": 0.1}[remat] * vision.num_hidden_layers
    learns = any("/vision/" in path for path in tree.flatten(program.state.trainable))
    return width * (inside + (layers if learns else 0)) + 5.0 * patches * colors  # as bytes and as float32


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> float:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _gathered(program: Program) -> float:
    """Bytes of two layers of the base, gathered from the devices that share them."""
    mesh = program.mesh.shape
    if mesh["fsdp"] * mesh["context"] == 1:
        return 0.0
    layers = [leaf for path, leaf in tree.flatten(program.variables["params"]).items() if path.startswith("layers/")]
    elements = sum(math.prod(leaf.shape) for leaf in layers) / program.model.spec.num_hidden_layers
    itemsize = jnp.dtype(program.model.dtype).itemsize
    return 2.0 * itemsize * elements / mesh["tensor"] / mesh["expert"]


def _scores(program: Program, tokens: float) -> tuple[float, float]:
    """Bytes of a layer's scores and weights of attention at a time, and of those that the backward pass keeps.

    XLA's alone: the kernels of accelerators have none, and whole rows keep none.
    """
    spec, length, mesh = program.model.spec, program.row_length, program.mesh
    model = program.model
    chosen = kernels.choose(model.attention, spec, model.dtype, length, mesh, model.matmul, model.shares)
    if chosen.name != "xla":
        return 0.0, 0.0
    whole = 8.0 * tokens * length * spec.num_attention_heads / mesh.shape["tensor"]
    parts, blocks, _ = attention.cut(length)
    if mesh.shape["context"] > 1 or parts == 1:
        return whole, whole
    return whole / (parts * blocks), 0.0


def _carried(spec: DecoderSpec) -> float:
    """Bytes of a token that layers with a memory keep besides, on the average of all layers: what goes into it and
    comes out, in float32, and the memory at the end of each chunk. Counted, not fitted.
    """

    def of_layer(of: Delta | Mamba) -> float:
        heads, _, width = of.memory
        return 4.0 * (of.channels + heads * width + math.prod(of.memory) / CHUNK)

    mixers = [(stack.spec.delta or stack.spec.mamba, len(stack.layers)) for stack in stacks(spec)]
    return sum(of_layer(mixer) * layers for mixer, layers in mixers if mixer) / spec.num_hidden_layers


def inner(spec: DecoderSpec) -> float:
    """Columns of an MLP, or of the experts that a token goes to, on the average of all layers, also those without."""

    def columns(of: DecoderSpec) -> int:
        if of.only == "mixer":
            return 0
        experts = of.experts
        return of.intermediate_size * experts.per_token + (experts.shared or 0) if experts else of.intermediate_size

    return sum(columns(stack.spec) * len(stack.layers) for stack in stacks(spec)) / spec.num_hidden_layers


@contextlib.contextmanager
def exhausted(what: str, hints: list[str]) -> Iterator[None]:
    """Around what compiles or runs on the devices: where their memory does not suffice, a UserError with the hints."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0][:200]
        lines = [f"out of memory while {what}; what makes it smaller, the cheapest first:", *hints]
        raise UserError("\n  ".join([*lines, f"(the device says: {said})"])) from error


def smaller(config: ConfigDict, mesh: Mesh) -> list[str]:
    """Settings that make a step of `config` smaller, the cheapest first."""
    rows, out = _divisible(config) // sharding.row_parts(mesh), []
    if method_of(config).rollouts and (fewer := config.rollouts.batch_size // 2):
        out.append(f"--config.rollouts.batch_size={fewer} (completions at a time; a run that has begun may go on so)")
    if more := [count for count in range(2 * config.accumulate, rows + 1) if rows % count == 0]:
        out.append(f"--config.accumulate={more[0]} (fewer rows at a time; a run that has begun may go on so)")
    if holds_reference_in_vain(config):
        out.append("--config.objective.cache_reference=True in another --workdir (no copy of the model beside it)")
    if config.model.remat == "none":
        out.append("--config.model.remat=full (layers are computed twice; a run that has begun may go on so)")
    if config.adapter.kind == "none":
        out.append("--config.adapter.kind=lora in another --workdir (adapters instead of all weights)")
    elif config.quantize.base != "nf4":
        bits = {"none": "int8", "int8": "nf4"}[config.quantize.base]
        out.append(f"--config.quantize.base={bits} in another --workdir (the base is stored smaller)")
    out.append(f"--config.data.max_length={config.data.max_length // 2} in another --workdir (examples are cut there)")
    if sharding.platform(mesh) == "gpu":
        out.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment (JAX takes 0.75 of a GPU by itself)")
    return out
