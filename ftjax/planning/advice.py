"""What to change so that a run fits a slice, or goes faster on it: candidates are compiled, not guessed."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import REMAT_POLICIES
from ftjax.models.spec import DecoderSpec
from ftjax.planning import compiled
from ftjax.planning.compiled import Plan, Program
from ftjax.planning.topology import Topology

BEST = 4  # settings that a search compiles


@dataclass(frozen=True)
class Candidate:
    """A config that differs from the given one in `changes`, as "model.remat=full"."""

    config: ConfigDict
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(f"--config.{change}" for change in self.changes) or "as it is"


@dataclass(frozen=True)
class Tried:
    candidate: Candidate
    plan: Plan | None  # None where the setting is not a possible one
    reason: str = ""  # why it is not


def changed(config: ConfigDict, **keys: object) -> Candidate:
    """Keys with "__" for the dot: changed(config, model__remat="full")."""
    out = config.copy_and_resolve_references()
    names = []
    for key, value in keys.items():
        section, _, name = key.rpartition("__")
        setattr(out[section] if section else out, name, value)
        names.append(f"{key.replace('__', '.')}={value}")
    return Candidate(out, tuple(names))


def remedies(config: ConfigDict, topology: Topology) -> Iterator[Candidate]:
    """What makes a run smaller, in the order of what it costs: time first, then what is learnt."""
    remats = [remat for remat in ("full", "offload") if remat in REMAT_POLICIES and remat != config.model.remat]
    smaller: dict[str, object] = {}
    if config.model.remat != "full" and "full" in remats:
        smaller["model__remat"] = "full"
        yield changed(config, **smaller)
    rows = config.data.batch_size
    parts = topology.chips // _unsplit(config)
    if (most := rows // parts) > config.accumulate and rows % parts == 0:
        smaller["accumulate"] = most
        yield changed(config, **smaller)
    if config.mesh.fsdp != -1 or config.mesh.data != 1:
        smaller |= {"mesh__data": 1, "mesh__fsdp": -1}
        yield changed(config, **smaller)
    if "offload" in remats:
        yield changed(config, **(smaller | {"model__remat": "offload"}))
    if config.adapter.kind != "none" and config.quantize.base != "nf4":
        for base in ("int8", "nf4") if config.quantize.base == "none" else ("nf4",):
            yield changed(config, **(smaller | {"quantize__base": base}))
    if config.adapter.kind == "none":
        yield changed(config, **(smaller | {"adapter__kind": "lora", "model__param_dtype": "bfloat16"}))


def _unsplit(config: ConfigDict) -> int:
    """Devices that share rows."""
    return math.prod(max(config.mesh[axis], 1) for axis in ("tensor", "context"))


def try_all(
    candidates: Iterator[Candidate], spec: DecoderSpec, topology: Topology, devices: list, tell: Callable[[str], None]
) -> list[Tried]:
    """Compiles each, one after the other."""
    out = []
    for candidate in candidates:
        try:
            tell(f"compiling {candidate}")
            configs.validate(candidate.config, data=False)
            program = compiled.describe(candidate.config, spec, devices)
            out.append(Tried(candidate, compiled.plan(program, topology)))
        except UserError as error:
            out.append(Tried(candidate, None, str(error)))
    return out


def fitting(tried: list[Tried]) -> list[Tried]:
    """Those that fit, the fastest first."""
    fits = [one for one in tried if one.plan is not None and one.plan.fits]
    return sorted(fits, key=lambda one: one.plan.roofline.step)


def searched(config: ConfigDict, spec: DecoderSpec, topology: Topology, devices: list) -> list[Candidate]:
    """Settings that may be the fastest: those of least estimated time among those that the estimate says fit.

    Meshes of data, fsdp and tensor that the batch and the heads divide, each remat policy, and 1 to 8 micro-batches.
    """
    found = []
    rows = config.data.batch_size
    for mesh in _meshes(spec, topology):
        keys = {f"mesh__{axis}": size for axis, size in mesh.items()}
        counts = [count for count in (1, 2, 4, 8) if rows % (count * mesh["data"] * mesh["fsdp"]) == 0]
        if not counts:
            continue
        program = compiled.describe(changed(config, accumulate=1, **keys).config, spec, devices)
        for remat, accumulate in itertools.product(("none", "dots", "full"), counts):
            candidate = changed(config, **keys, model__remat=remat, accumulate=accumulate)
            seconds, size = estimate(candidate.config, program, topology)
            if size <= 1.1 * topology.chip.usable:  # the estimate is coarse; the compiler decides
                found.append((seconds, len(found), candidate))
    return [candidate for _, _, candidate in sorted(found)[:BEST]]


def _meshes(spec: DecoderSpec, topology: Topology) -> Iterator[dict[str, int]]:
    """Every data x fsdp x tensor of the chips; several slices are joined by data alone."""
    sizes = [size for size in range(1, topology.chips + 1) if topology.chips % size == 0]
    for data, tensor in itertools.product(sizes, sizes):
        fits_heads = spec.num_key_value_heads % tensor == 0 and tensor <= 8
        if topology.chips % (data * tensor) == 0 and data % topology.slices == 0 and fits_heads:
            yield {"data": data, "fsdp": topology.chips // (data * tensor), "tensor": tensor}


def estimate(config: ConfigDict, program: Program, topology: Topology) -> tuple[float, float]:
    """(seconds of a step, bytes on a chip), without compiling: to order candidates by, no more."""
    mesh, chip, spec = program.mesh.shape, topology.chip, program.spec
    leaves = [*jax.tree.leaves(program.state), *jax.tree.leaves(program.frozen)]
    arguments = sum(compiled.bytes_on_chip(leaf) for leaf in leaves)
    trained = sum(compiled.bytes_on_chip(leaf) for leaf in jax.tree.leaves(program.state.trainable))
    tokens = config.data.batch_size * config.data.max_length / config.accumulate / (mesh["data"] * mesh["fsdp"])
    width = 2.0 * tokens * spec.hidden_size
    inner = spec.intermediate_size * (spec.experts.per_token if spec.experts else 1) / spec.hidden_size / mesh["tensor"]
    per_layer = {"full": 1.0, "dots": 6.0 + 2 * inner, "none": 12.0 + 4 * inner}[config.model.remat]
    activations = width * per_layer * spec.num_hidden_layers
    size = arguments + trained + activations + width * (12.0 + 4 * inner)
    again = {"full": 1.0, "dots": 0.2, "none": 0.0}[config.model.remat]
    needed = program.flops
    compute = (needed.total + again * (needed.forward + needed.attention)) / topology.chips / chip.flops
    kernels = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in tree.flatten(program.frozen).items()
        if not path.startswith("lora/")
    )
    whole = sum(2.0 * math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.trainable))
    gathered = (kernels + whole) / mesh["tensor"] * (2 * config.accumulate) + whole / mesh["tensor"] * config.accumulate
    gathered *= (mesh["fsdp"] - 1) / mesh["fsdp"]
    between = 4 * 2 * width * config.accumulate * spec.num_hidden_layers * (mesh["tensor"] - 1) / mesh["tensor"]
    links = chip.link * len([side for side in topology.sides if side > 1])
    return max(compute, (gathered + between) / max(links, chip.link)), size
