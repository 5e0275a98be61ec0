"""Compiles the training step that a config describes, for devices that are not there, and reads what it needs."""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, preflight, sharding, tree
from ftjax.assemble import Program
from ftjax.errors import UserError
from ftjax.memory import bytes_on_device
from ftjax.models.decoder import Decoder
from ftjax.models.spec import DecoderSpec
from ftjax.objectives.reference import TEACHER
from ftjax.planning import flops, hlo, traffic
from ftjax.planning.flops import Flops
from ftjax.planning.roofline import Roofline, roofline
from ftjax.planning.topology import Topology
from ftjax.planning.traffic import Collective

STEPS = 1000  # of the schedule; the program does not depend on it


@dataclass(frozen=True)
class Memory:
    """Bytes on a chip, while the step runs."""

    parameters: float  # frozen ones, and those that are trained whole
    adapters: float
    teacher: float
    optimizer: float
    batch: float
    temporaries: float  # activations, gradients, gathered weights: the compiler's own figure
    output: float  # what does not take the place of an argument
    host: float  # of its host, not its own: offloaded activations

    @property
    def arguments(self) -> float:
        return self.parameters + self.adapters + self.teacher + self.optimizer + self.batch

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.output


@dataclass(frozen=True)
class Plan:
    """What compiling told. Where it did not fit, `memory` is None and `lacking` the bytes by which it did not."""

    memory: Memory | None
    lacking: float
    flops: Flops  # of a step over all chips
    executed: float  # FLOPs of one chip, recomputation included
    moved: float  # bytes of HBM
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    unknown_loops: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.lacking <= 0


def describe(
    config: ConfigDict, spec: DecoderSpec, devices: list[jax.Device], teacher: DecoderSpec | None = None
) -> Program:
    """The step of `config` on its mesh of these devices; teacher: of the model that it learns from, if there is one.

    Raises UserError where the batch does not divide, and for a model that sees images.
    """
    if config.model.vision:
        raise UserError(
            "config.model.vision: what is compiled here has no vision tower; set --config.model.vision=False for the "
            "language model, and keep some memory for the tower"
        )
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    dtypes = jnp.dtype(config.model.dtype), jnp.dtype(config.model.param_dtype)
    how = {"attention": config.model.attention, "matmul": config.model.matmul}
    own = {"neftune": config.model.neftune_alpha, "shares": config.data.share_prefixes}
    model = Decoder(spec, *dtypes, config.model.remat, **own, **how)
    preflight.check_mesh(config, spec, mesh)
    preflight.check_sharing(config, spec, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        beside = teacher and Decoder(teacher, *dtypes, **how)
        return assemble.program(config, model, mesh, STEPS, beside)


def compile_text(mesh: Mesh, trace: Callable[[], Any]) -> tuple[str, object]:
    """(the optimized HLO of what `trace` traces, the compiler's memory analysis).

    JaxRuntimeError where it runs out of memory.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tempfile.TemporaryDirectory() as dump:
        lowered = trace().lower(lowering_platforms=("tpu",))
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        return _optimized(Path(dump)), compiled.memory_analysis()


def _optimized(directory: Path) -> str:
    """The optimized module as libtpu itself writes it: of several, the largest is the step.

    `compiled.as_text()` says the same, but reads libtpu's module back first, and fails where jaxlib's form of it lacks
    an operation ("async-update", as on larger v5p slices).
    """
    files = sorted(directory.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
    if not files:
        raise FileNotFoundError(f"the compiler left no text of the module in {directory}")
    return files[-1].read_text()


def plan(program: Program, topology: Topology) -> Plan:
    """Compiles; seconds to a minute. Any model takes the same time: its layers are one loop."""
    needed = flops.of_step(program)
    try:
        text, analysis = compile_text(
            program.mesh, lambda: program.step.trace(program.state, program.frozen, program.batch)
        )
    except jax.errors.JaxRuntimeError as error:
        lacking = exceeded(str(error))
        if lacking is None:
            raise
        return Plan(None, lacking, needed, 0.0, 0.0, (), None, ())
    module = hlo.parse(text)
    collectives = tuple(traffic.collectives(module, program.mesh))
    executed = traffic.matrix_flops(module) + traffic.kernel_flops(module, flops.reaches(program))
    moved = traffic.memory_bytes(module)
    memory = _memory(program, analysis)
    lacking = memory.total - topology.chip.usable
    limits = roofline(topology, executed, moved, list(collectives))
    loops = tuple(module.unknown_loops)
    return Plan(memory, lacking, needed, executed, moved, collectives, limits, loops)


_TOO_LARGE = re.compile(r"required for .*?\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm")


def exceeded(message: str) -> float | None:
    """By how many bytes a program is too large, from the compiler's error; None where the error is another one."""
    found = _TOO_LARGE.search(message) or _USED.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    needed, there = (_size(text) for text in found.groups())
    return needed - there


def _size(text: str) -> float:
    """Bytes of "15.75G"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)


def _memory(program: Program, analysis) -> Memory:
    leaves = [*tree.flatten(program.state.trainable).items(), *tree.flatten(program.frozen).items()]
    adapters = sum(bytes_on_device(leaf) for path, leaf in leaves if path.startswith("lora/"))
    teacher = sum(bytes_on_device(leaf) for path, leaf in leaves if path.startswith(f"{TEACHER}/"))
    whole = sum(map(bytes_on_device, (leaf for _, leaf in leaves))) - adapters - teacher
    state = program.state
    optimizer = sum(map(bytes_on_device, jax.tree.leaves((state.opt_state, state.kept, state.step))))
    # What is left of the compiler's own sum of arguments: the batch, and the padding of arrays to their tiles.
    batch = analysis.argument_size_in_bytes - whole - adapters - teacher - optimizer
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    host = analysis.host_temp_size_in_bytes
    return Memory(whole, adapters, teacher, optimizer, batch, analysis.temp_size_in_bytes, output, host)
