"""Bytes that collectives move and that operations read and write, and the FLOPs of matrix products, from HLO.

All figures are for one chip and one whole step: each operation counts as often as the loops around it run.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ftjax.planning.hlo import Array, Computation, Instruction, Module
from ftjax.planning.topology import slice_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    ici, dcn: bytes that reach a chip from others of its slice, and from other slices, all executions together.
    """

    kind: str
    axes: tuple[str, ...]  # of the mesh
    ici: float
    dcn: float
    rings: tuple[int, ...]  # the torus dimensions that a group spans
    times: int
    where: str


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """Every collective of the module; one that the compiler spread over several fusions is counted once.

    Between slices libtpu has the hosts exchange data: those are `send`s to its own runtime in the module.
    """
    found, seen = [], {}
    for one, computation, times in module.walk():
        if one.opcode == "send" and "xla_megascale_runtime" in one.rest:
            found.append(_between_slices(one, computation, times, mesh))
            continue
        kind = next((kind for kind in KINDS if one.opcode in (kind, f"{kind}-start")), None)
        if kind is None:
            continue
        if kind == "all-reduce" and _scatters(one, computation):
            kind = "reduce-scatter"
        # An "async collective fusion" repeats its operation in each part of itself, with one channel.
        channel = one.attribute(r"channel_id=(\d+)") or one.name
        if (key := (kind, channel)) in seen and computation.name.startswith(("fused", "async")):
            continue
        seen[key] = True
        found.append(_collective(kind, one, computation, times, mesh))
    return [one for one in found if one.ici or one.dcn]


def _scatters(one: Instruction, computation: Computation) -> bool:
    """An all-reduce of which a fusion keeps a part is how a TPU spells reduce-scatter."""
    users = [other for other in computation.instructions.values() if one.name in other.operands]
    return "reduce-scatter" in computation.name or (bool(users) and all(u.opcode == "dynamic-slice" for u in users))


def _collective(kind: str, one: Instruction, computation: Computation, times: int, mesh: Mesh) -> Collective:
    """One within a slice; where there are several the module is that of each, and `data` goes between them.

    Its partitions are then the first devices of the mesh: slices differ in `data`, which is the mesh's first axis.
    """
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", one.attribute(r"source_target_pairs=\{(.*?\})\}") or "")
        members = np.unique([[int(a), int(b)] for a, b in pairs if a != b])
        if not len(members):
            return Collective(kind, (), 0, 0, (), times, "")
        share = 1.0
    else:
        members = replica_groups(one.rest, mesh.size // count_slices(mesh))[0]
        both = 2 if kind == "all-reduce" else 1  # a sum is scattered, then gathered
        share = both * (len(members) - 1) / len(members)
    places = np.array([device.coords for device in mesh.devices.flat])[members]
    rings = tuple(i for i in range(places.shape[1]) if len(np.unique(places[:, i])) > 1)
    ici = share * _payload(kind, one, computation) * times
    return Collective(kind, _spanned(members, mesh), ici, 0, rings, times, one.attribute(r'op_name="([^"]*)"') or "")


def count_slices(mesh: Mesh) -> int:
    return len({slice_of(device) for device in mesh.devices.flat})


# Bytes that reach a chip for each byte that it sends, among n slices.
_BETWEEN_SLICES = {
    "ALL_REDUCE": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "REDUCE_SCATTER": ("reduce-scatter", lambda n: (n - 1) / n),
    "ALL_GATHER": ("all-gather", lambda n: n - 1),
    "ALL_TO_ALL": ("all-to-all", lambda n: (n - 1) / n),
    "ONE_TO_ONE": ("collective-permute", lambda n: 1),
    "COLLECTIVE_PERMUTE": ("collective-permute", lambda n: 1),
}


def _between_slices(one: Instruction, computation: Computation, times: int, mesh: Mesh) -> Collective:
    """What libtpu makes of a collective over several slices: each chip hands its part to its host, which reduces it
    with those of the same chip of the other slices. The part within a slice is a collective of its own beside it."""
    how = one.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if how not in _BETWEEN_SLICES:
        raise ValueError(f"traffic between slices of a kind that is not known: {how}")
    kind, share = _BETWEEN_SLICES[how]
    slices = count_slices(mesh)
    sent = sum(array.bytes for array in computation.instructions[one.operands[0]].arrays)
    return Collective(kind, _slice_axes(mesh), 0, sent * share(slices) * times, (), times, "")


def _slice_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that lead to another slice."""
    slices = np.vectorize(slice_of, otypes=[int])(mesh.devices)
    return tuple(name for i, name in enumerate(mesh.axis_names) if (slices != slices.take([0], axis=i)).any())


def _payload(kind: str, one: Instruction, computation: Computation) -> float:
    """Bytes of the whole array on a chip: what a gather gives, what a reduction is given."""
    if kind in ("all-gather", "all-to-all", "collective-permute"):
        arrays = one.arrays
        if one.opcode.endswith("-start"):  # (operand, result, what the transfer needs)
            arrays = arrays[1:2] if len(one.operands) == 1 else arrays[len(one.operands) : 2 * len(one.operands)]
        return sum(array.bytes for array in arrays)
    operands = [computation.instructions[name] for name in one.operands]
    return sum(array.bytes for operand in operands for array in operand.arrays)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, members] of places among the module's partitions, in any of the three ways in which HLO writes them."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}", attributes):
        return _by_axes(found[1], found[2])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sides = (tuple(map(int, part.split(","))) for part in (found[1], found[2]))
        ids = np.arange(devices).reshape(sides)
        return (ids.transpose(tuple(map(int, found[3].split(",")))) if found[3] else ids).reshape(shape)
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array(
            [[int(member) for member in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        )
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(devices)[None]
    raise ValueError(f"replica groups in a form that is not known: {attributes[:200]}")


def _by_axes(mesh: str, chosen: str) -> np.ndarray:
    """`'a'=4,'b'=2` and `'a':(2)2,'b'`: groups along axes, or along a part of one (its size before, its own size)."""
    sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        parts.setdefault(name, []).append((int(before), int(size)) if size else (1, sides[name]))
    shape, grouped, place = [], [], {}
    for name, side in sides.items():
        cuts = sorted({1, side, *(b for b, _ in parts.get(name, [])), *(b * s for b, s in parts.get(name, []))})
        for low, high in itertools.pairwise(cuts):
            inside = any(b <= low and high <= b * s for b, s in parts.get(name, []))
            place[name, low] = len(shape)
            shape.append(high // low)
            grouped.append(inside)
    order = [i for i, inside in enumerate(grouped) if not inside] + [i for i, inside in enumerate(grouped) if inside]
    members = math.prod(size for size, inside in zip(shape, grouped) if inside)
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1, members)


def _spanned(members: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(members, tuple(mesh.shape.values())))
    return tuple(name for name, row in zip(mesh.axis_names, places) if len(np.unique(row)) > 1)


# Operations that move no data, or whose data is counted in what they call.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"})
_FREE |= {"async-update", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"}


def matrix_flops(module: Module) -> float:
    """FLOPs of all matrix products: two for each multiplication, on a TPU most are convolutions in the text."""
    groups = _ragged(module)
    return sum(
        times * _flops(one, computation) / groups.get(computation.name, 1)
        for one, computation, times in module.walk()
        if one.opcode in ("convolution", "dot")
    )


def _ragged(module: Module) -> dict[str, int]:
    """{fused computation: groups} of the products of experts. In the text each is a product of all rows with every
    group's kernel and a mask; what the mask leaves out the TPU skips, and a row is in one group."""
    found = {}
    for one, _, _ in module.walk():
        if one.opcode == "fusion" and (groups := one.attribute(r'"num_groups_in_ragged_dot":"(\d+)"')):
            found[one.called["calls"]] = int(groups)
    return found


def _flops(one: Instruction, computation: Computation) -> float:
    left, right = (computation.instructions[name].arrays[0] for name in one.operands[:2])
    result = math.prod(one.arrays[0].sides)
    if one.opcode == "dot":
        contracted = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * result * math.prod(left.sides[int(i)] for i in contracted.split(",") if i)
    labels = one.attribute(r"dim_labels=(\S+?)(?:,|$)")
    inputs, kernel, outputs = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels).groups()
    spatial = [label for label in kernel if label.isdigit()]
    window = one.attribute(r"window=\{([^}]*)\}") or ""
    # Where the window reaches into the padding nothing is multiplied: batches of products are written in this way.
    pairs = 1.0
    for position, label in enumerate(sorted(spatial)):
        pairs *= _pairs(
            left.sides[inputs.index(label)],
            right.sides[kernel.index(label)],
            one.arrays[0].sides[outputs.index(label)],
            {name: value.split("x")[position] for name, value in re.findall(r"(\w+)=([\d_x\-]+)", window)},
        )
    over_channels = right.sides[kernel.index("i")]
    others = result / math.prod(one.arrays[0].sides[outputs.index(label)] for label in spatial)
    return 2.0 * others * over_channels * pairs


def _pairs(size: int, window: int, outputs: int, options: dict[str, str]) -> int:
    """How many (output, window) places of one dimension meet an element of the input."""
    low = int(options.get("pad", "0_0").split("_")[0])
    stride, dilated = int(options.get("stride", 1)), int(options.get("lhs_dilate", 1))
    spread = int(options.get("rhs_dilate", 1))
    place = np.arange(outputs)[:, None] * stride + np.arange(window)[None] * spread - low
    inside = (place >= 0) & (place <= (size - 1) * dilated) & (place % dilated == 0)
    return int(inside.sum())


def memory_bytes(module: Module) -> float:
    """Bytes that operations read from HBM and write to it, caches apart: each operand and result of each operation.

    What lies in the vector memory is free; of an array that an operation only takes a slice of, the slice counts.
    """
    total = 0.0
    fused = {one.called["calls"] for one, _, _ in module.walk() if one.opcode == "fusion"}
    seen = set()
    for one, computation, times in module.walk():
        if computation.name in fused:
            # One that travels while products are computed is handed through each of them, and moves once.
            channel = one.attribute(r"channel_id=(\d+)") or one.name
            if one.opcode in KINDS and (one.opcode, channel) not in seen:
                seen.add((one.opcode, channel))
                total += times * _written_and_read(one, computation)
        elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
            total += times * _moved(one, computation, module)
    return total


def _written_and_read(one: Instruction, computation: Computation) -> float:
    read = (_in_hbm(computation.instructions[name].arrays) for name in one.operands)
    return _in_hbm(one.arrays) + sum(read)


def _moved(one: Instruction, computation: Computation, module: Module) -> float:
    written = _in_hbm(one.arrays)
    read = [_in_hbm(computation.instructions[name].arrays) for name in one.operands if name in computation.instructions]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if one.opcode == "dynamic-update-slice":
        return 2 * read[1] if len(read) > 1 else written
    if one.opcode in ("copy-start", "slice-start", "async-start"):
        moved = one.arrays[:1] if one.opcode == "copy-start" else ()
        return sum(array.bytes for array in moved)
    if one.opcode.endswith("-start"):
        return sum(read)
    if one.opcode == "fusion":
        inside = module.computations[one.called["calls"]]
        total = 0.0
        for number, size in enumerate(read):
            total += _read_in_fusion(inside, number, size)
        root = inside.root
        roots = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for part in roots:
            total += _written_in_fusion(inside, part)
        return total
    return written + sum(read)


def _read_in_fusion(inside: Computation, number: int, size: float) -> float:
    """Of parameter `number`: all of it, or the slices that are taken."""
    name = inside.parameter(number).name
    passed_on = ("tuple", *KINDS)
    users = [one for one in inside.instructions.values() if name in one.operands and one.opcode not in passed_on]
    if not users:
        return 0.0
    if all(one.opcode in ("dynamic-slice", "gather") and one.operands[0] == name for one in users):
        return min(size, sum(array.bytes for one in users for array in one.arrays))
    if all(one.opcode == "dynamic-update-slice" and one.operands[0] == name for one in users):
        return 0.0
    return size


def _written_in_fusion(inside: Computation, part: Instruction) -> float:
    seen = part
    while seen.opcode in ("bitcast", "copy", "convert") and seen.operands:
        seen = inside.instructions[seen.operands[0]]
    if seen is part and (seen.opcode == "parameter" or seen.opcode in KINDS):
        return 0.0
    if seen.opcode == "dynamic-update-slice":
        update = inside.instructions[seen.operands[1]]
        return sum(array.bytes for array in update.arrays)
    return _in_hbm(part.arrays)


def _in_hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


# Products of a block of queries with a block of keys, and of the like, in each kernel of splash attention.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(module: Module, reaches: list[float]) -> float:
    """FLOPs of the attention kernels, of which the text shows only that they are called.

    reaches: how many keys a query of each layer sees, on average over a row. Where layers differ in it each has a
    branch of its own for every different kernel, of which it runs one.
    """
    kinds = len(set(reaches))
    reach = sum(reaches) / len(reaches)
    total = 0.0
    for one, computation, times in module.walk():
        products = next((n for name, n in _KERNELS.items() if one.opcode == "custom-call" and name in one.name), None)
        if products:
            operands = (array for name in one.operands for array in computation.instructions[name].arrays)
            queries = max(math.prod(array.sides) for array in operands if array.dtype in ("bf16", "f32"))
            total += 2.0 * products * queries * reach * times / kinds
    return total
