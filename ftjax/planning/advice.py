"""What to change so that a run fits a slice, or goes faster on it: candidates are compiled, not guessed."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import memory, tree
from ftjax.assemble import Program
from ftjax.errors import UserError
from ftjax.method import holds_reference_in_vain
from ftjax.models.spec import DecoderSpec
from ftjax.planning import compiled, flops
from ftjax.planning.chips import GIB
from ftjax.planning.compiled import Plan
from ftjax.planning.topology import Topology

BEST = 4  # settings of a search that must fit before it ends
MOST = 8  # compiles of a search, or of looking for what fits

Describe = Callable[[ConfigDict], Program]  # `compiled.describe` of a model on the devices of a slice


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
    """What makes a run smaller, in the order of what it costs: time, then what is learned. The cheap ones add up."""
    smaller: dict[str, object] = {}
    rows, accumulate = config.data.batch_size, config.accumulate
    if holds_reference_in_vain(config):
        smaller["objective__cache_reference"] = True
        yield changed(config, **smaller)
    if config.model.remat == "none":
        smaller["model__remat"] = "full"
        yield changed(config, **smaller)
    if config.mesh.data > topology.slices and config.mesh.data % topology.slices == 0:
        smaller |= {"mesh__data": topology.slices, "mesh__fsdp": -1}
        yield changed(config, **smaller)
    shared = math.prod(max(config.mesh[axis], 1) for axis in ("tensor", "context"))  # devices that share rows
    parts = topology.chips // shared
    most = rows // parts if rows % parts == 0 else accumulate
    halves = [accumulate * 2**i for i in range(1, 20) if most % (accumulate * 2**i) == 0]
    for count in sorted({*halves[:1], *halves[-1:]}):  # half as many rows at a time, and one
        smaller["accumulate"] = count
        yield changed(config, **smaller)
    if config.model.remat != "offload":
        yield changed(config, **(smaller | {"model__remat": "offload"}))
    if config.mesh.context == 1 and config.data.max_length % 256 == 0 and parts % 2 == 0 and rows % (parts // 2) == 0:
        yield changed(config, **(smaller | {"mesh__context": 2, "mesh__fsdp": -1, "accumulate": 2 * rows // parts}))
    if most > 1:  # one row a chip, and no sum of gradients over micro-batches
        yield changed(config, **(smaller | {"accumulate": 1, "data__batch_size": parts}))
    bases = {"none": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}[config.quantize.base]
    for base in bases if config.adapter.kind != "none" else ():
        yield changed(config, **(smaller | {"quantize__base": base}))
    if config.adapter.kind == "none":
        yield changed(config, **(smaller | {"adapter__kind": "lora", "model__param_dtype": "bfloat16"}))


def try_all(
    candidates: Iterator[Candidate], describe: Describe, topology: Topology, tell: Callable[[str], None]
) -> list[Tried]:
    """Compiles each, one after the other, at most MOST."""
    return [attempt(one, describe, topology, tell) for one in itertools.islice(candidates, MOST)]


def attempt(candidate: Candidate, describe: Describe, topology: Topology, tell: Callable[[str], None]) -> Tried:
    """Compiles one; says before what, and after what came of it."""
    tell(f"compiling {candidate}")
    try:
        configs.validate(candidate.config, data=False)
        found = compiled.plan(describe(candidate.config), topology)
    except UserError as error:
        tell(f"  not possible: {error}")
        return Tried(candidate, None, str(error))
    step = f"step at least {1000 * found.roofline.step:,.0f} ms" if found.roofline else ""
    tell(f"  fits, {step}" if found.fits else f"  {found.lacking / GIB:.2f} GiB too large")
    return Tried(candidate, found)


def search(
    config: ConfigDict, spec: DecoderSpec, topology: Topology, describe: Describe, tell: Callable[[str], None]
) -> list[Tried]:
    """Compiles what may be the fastest until BEST settings fit, at most MOST compiles.

    Where a setting turns out too large, so does the estimate: more micro-batches are then tried on the same mesh.
    """
    ways = list(_ways(config, spec, topology, describe))
    tell(f"{len(ways)} meshes and remat policies are expected to fit; compiling the fastest of them, {MOST} at most")
    out: list[Tried] = []
    for way in ways:
        for candidate in way:
            if len(out) == MOST or len(fitting(out)) == BEST:
                return out
            out.append(attempt(candidate, describe, topology, tell))
            if out[-1].plan is not None and out[-1].plan.fits:
                break
    return out


def fitting(tried: list[Tried]) -> list[Tried]:
    """Those that fit, the fastest first."""
    fits = [one for one in tried if one.plan is not None and one.plan.fits]
    return sorted(fits, key=lambda one: one.plan.roofline.step)


def _ways(config: ConfigDict, spec: DecoderSpec, topology: Topology, describe: Describe) -> Iterator[list[Candidate]]:
    """Settings by their estimated time: of each mesh and remat policy the fewest micro-batches that fit, then more.

    Meshes of data, fsdp and tensor that the batch and the heads divide, and 1 to 8 micro-batches.
    """
    found = []
    rows = config.data.batch_size
    for mesh in _meshes(spec, topology):
        keys = {f"mesh__{axis}": size for axis, size in mesh.items()}
        counts = [count for count in (1, 2, 4, 8) if rows % (count * mesh["data"] * mesh["fsdp"]) == 0]
        if not counts:
            continue
        program = describe(changed(config, accumulate=counts[0], **keys).config)
        for remat in ("none", "full"):
            each = [changed(config, **keys, model__remat=remat, accumulate=count) for count in counts]
            estimates = [estimate(one.config, program, topology) for one in each]
            # The estimate is coarse; the compiler decides.
            fits = [i for i, (_, size) in enumerate(estimates) if size <= 1.1 * topology.chip.usable]
            if fits:
                found.append((estimates[fits[0]][0], len(found), each[fits[0] :]))
    for _, _, way in sorted(found):
        yield way


def _meshes(spec: DecoderSpec, topology: Topology) -> Iterator[dict[str, int]]:
    """Every data x fsdp x tensor of the chips; several slices are joined by data alone."""
    sizes = [size for size in range(1, topology.chips + 1) if topology.chips % size == 0]
    for data, tensor in itertools.product(sizes, sizes):
        fits_heads = spec.num_key_value_heads % tensor == 0 and tensor <= 8
        if topology.chips % (data * tensor) == 0 and data % topology.slices == 0 and fits_heads:
            yield {"data": data, "fsdp": topology.chips // (data * tensor), "tensor": tensor}


def estimate(config: ConfigDict, program: Program, topology: Topology) -> tuple[float, float]:
    """(seconds of a step, bytes on a chip), without compiling: to order candidates by, no more."""
    mesh, chip, spec = program.mesh.shape, topology.chip, program.model.spec
    tokens = program.tokens / config.accumulate / (mesh["data"] * mesh["fsdp"])
    width = 2.0 * tokens * spec.hidden_size
    size = memory.needed(program, config.model.remat, config.accumulate)
    again = 0.0 if config.model.remat == "none" else 1.0
    needed = flops.of_step(program)
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
