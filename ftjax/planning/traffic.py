"""From HLO: the bytes that collectives move, the bytes that operations read and write, the FLOPs of matrix products.

All figures are for one chip and one step: each operation counts as often as the loops around it run.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from ftjax.planning.hlo import Array, Computation, Instruction, Module
from ftjax.planning.topology import slice_of

COLLECTIVE_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    ici, dcn: bytes that reach a chip from others of its slice, and from other slices, all executions together.
    """

    kind: str  # one of COLLECTIVE_KINDS
    axes: tuple[str, ...]  # the mesh axes along which a group of chips lies
    ici: float
    dcn: float
    rings: tuple[int, ...]  # the torus dimensions that a group spans
    times: int


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """Every collective of the module; one that the compiler distributed over several fusions is counted once.

    Data between slices goes through the hosts: in the module it is a `send` to libtpu's own runtime.
    """
    out, seen = [], set()
    for op, computation, times in module.walk():
        if op.opcode == "send" and "xla_megascale_runtime" in op.rest:
            out.append(_between_slices(op, computation, times, mesh))
            continue
        kind = next((kind for kind in COLLECTIVE_KINDS if op.opcode in (kind, f"{kind}-start")), None)
        if kind is None:
            continue
        if kind == "all-reduce" and _scatters(op, computation):
            kind = "reduce-scatter"
        # An "async collective fusion" repeats its operation in each part of itself, with one channel.
        channel = op.attribute(r"channel_id=(\d+)") or op.name
        if (key := (kind, channel)) in seen and computation.name.startswith(("fused", "async")):
            continue
        seen.add(key)
        out.append(_collective(kind, op, computation, times, mesh))
    return [collective for collective in out if collective.ici or collective.dcn]


def _scatters(op: Instruction, computation: Computation) -> bool:
    """An all-reduce of which a fusion keeps a part is how a TPU spells reduce-scatter."""
    users = [other for other in computation.instructions.values() if op.name in other.operands]
    return "reduce-scatter" in computation.name or (bool(users) and all(u.opcode == "dynamic-slice" for u in users))


def _collective(kind: str, op: Instruction, computation: Computation, times: int, mesh: Mesh) -> Collective:
    """A collective within a slice.

    With several slices the module is the program of one of them. Its partitions are then the first devices of the mesh,
    since slices differ in `data`, which is the mesh's first axis.
    """
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute(r"source_target_pairs=\{(.*?\})\}") or "")
        members = np.unique([[int(a), int(b)] for a, b in pairs if a != b])
        if not len(members):
            return Collective(kind, (), 0, 0, (), times)
        share = 1.0
    else:
        members = replica_groups(op.rest, mesh.size // count_slices(mesh))[0]
        both = 2 if kind == "all-reduce" else 1  # an all-reduce is a reduce-scatter and an all-gather
        share = both * (len(members) - 1) / len(members)
    coordinates = np.array([device.coords for device in mesh.devices.flat])[members]
    rings = tuple(i for i in range(coordinates.shape[1]) if len(np.unique(coordinates[:, i])) > 1)
    ici = share * _payload(kind, op, computation) * times
    return Collective(kind, _spanned(members, mesh), ici, 0, rings, times)


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


def _between_slices(op: Instruction, computation: Computation, times: int, mesh: Mesh) -> Collective:
    """A collective over several slices, as libtpu writes it: each chip sends its part to its host, which reduces it
    with those of the same chip in other slices. The exchange within a slice is a separate collective."""
    transfer = op.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if transfer not in _BETWEEN_SLICES:
        raise ValueError(f"traffic between slices of an unknown kind: {transfer}")
    kind, share = _BETWEEN_SLICES[transfer]
    slices = count_slices(mesh)
    sent = sum(array.bytes for array in computation.instructions[op.operands[0]].arrays)
    return Collective(kind, _slice_axes(mesh), 0, sent * share(slices) * times, (), times)


def _slice_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the slice changes."""
    slices = np.vectorize(slice_of, otypes=[int])(mesh.devices)
    return tuple(name for i, name in enumerate(mesh.axis_names) if (slices != slices.take([0], axis=i)).any())


def _payload(kind: str, op: Instruction, computation: Computation) -> float:
    """Bytes on a chip of the whole array: the result of a gather, the operand of a reduction."""
    if kind in ("all-gather", "all-to-all", "collective-permute"):
        arrays = op.arrays
        if op.opcode.endswith("-start"):  # (operand, result, what the transfer needs)
            arrays = arrays[1:2] if len(op.operands) == 1 else arrays[len(op.operands) : 2 * len(op.operands)]
        return sum(array.bytes for array in arrays)
    operands = [computation.instructions[name] for name in op.operands]
    return sum(array.bytes for operand in operands for array in operand.arrays)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """int [groups, members], the module's partitions in each group, from any of HLO's three notations."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}", attributes):
        return _by_axes(match[1], match[2])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sides = (tuple(map(int, part.split(","))) for part in (match[1], match[2]))
        ids = np.arange(devices).reshape(sides)
        return (ids.transpose(tuple(map(int, match[3].split(",")))) if match[3] else ids).reshape(shape)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array(
            [[int(member) for member in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]
        )
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(devices)[None]
    raise ValueError(f"replica groups in an unknown notation: {attributes[:200]}")


def _by_axes(mesh: str, chosen: str) -> np.ndarray:
    """Groups along mesh axes: `mesh` is `'a'=4,'b'=2`, `chosen` is `'a':(2)2,'b'`, where a part of an axis is given as
    (the product of the sizes before it) and its own size."""
    sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        parts.setdefault(name, []).append((int(before), int(size)) if size else (1, sides[name]))
    shape, grouped = [], []
    for name, side in sides.items():
        cuts = sorted({1, side, *(b for b, _ in parts.get(name, [])), *(b * s for b, s in parts.get(name, []))})
        for low, high in itertools.pairwise(cuts):
            inside = any(b <= low and high <= b * s for b, s in parts.get(name, []))
            shape.append(high // low)
            grouped.append(inside)
    order = [i for i, inside in enumerate(grouped) if not inside] + [i for i, inside in enumerate(grouped) if inside]
    members = math.prod(size for size, inside in zip(shape, grouped) if inside)
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1, members)


def _spanned(members: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    coordinates = np.array(np.unravel_index(members, tuple(mesh.shape.values())))
    return tuple(name for name, row in zip(mesh.axis_names, coordinates) if len(np.unique(row)) > 1)


# Operations that move no data, or whose data is counted in the computations that they call.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"})
_FREE |= {"async-update", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"}


def matrix_flops(module: Module) -> float:
    """FLOPs of all matrix products, two for each multiplication. In a TPU's program most are convolutions."""
    groups = _ragged(module)
    return sum(
        times * _flops(op, computation) / groups.get(computation.name, 1)
        for op, computation, times in module.walk()
        if op.opcode in ("convolution", "dot")
    )


def _ragged(module: Module) -> dict[str, int]:
    """{fused computation: groups} of the products of experts. In the text each multiplies all rows by every group's
    kernel, under a mask. The TPU skips what is masked, and each row belongs to one group."""
    groups_of = {}
    for op, _, _ in module.walk():
        if op.opcode == "fusion" and (groups := op.attribute(r'"num_groups_in_ragged_dot":"(\d+)"')):
            groups_of[op.called["calls"]] = int(groups)
    return groups_of


def _flops(op: Instruction, computation: Computation) -> float:
    left, right = (computation.instructions[name].arrays[0] for name in op.operands[:2])
    result = math.prod(op.arrays[0].sides)
    if op.opcode == "dot":
        contracted = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * result * math.prod(left.sides[int(i)] for i in contracted.split(",") if i)
    labels = op.attribute(r"dim_labels=(\S+?)(?:,|$)")
    inputs, kernel, outputs = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels).groups()
    spatial = [label for label in kernel if label.isdigit()]
    window = op.attribute(r"window=\{([^}]*)\}") or ""
    # Nothing is multiplied where the window reaches into the padding; XLA writes batches of products in that way.
    pairs = 1.0
    for position, label in enumerate(sorted(spatial)):
        pairs *= _pairs(
            left.sides[inputs.index(label)],
            right.sides[kernel.index(label)],
            op.arrays[0].sides[outputs.index(label)],
            {name: value.split("x")[position] for name, value in re.findall(r"(\w+)=([\d_x\-]+)", window)},
        )
    over_channels = right.sides[kernel.index("i")]
    others = result / math.prod(op.arrays[0].sides[outputs.index(label)] for label in spatial)
    return 2.0 * others * over_channels * pairs


def _pairs(size: int, window: int, outputs: int, options: dict[str, str]) -> int:
    """The number of (output, window) positions of one dimension that fall on an element of the input."""
    low = int(options.get("pad", "0_0").split("_")[0])
    stride, dilated = int(options.get("stride", 1)), int(options.get("lhs_dilate", 1))
    spread = int(options.get("rhs_dilate", 1))
    position = np.arange(outputs)[:, None] * stride + np.arange(window)[None] * spread - low
    inside = (position >= 0) & (position <= (size - 1) * dilated) & (position % dilated == 0)
    return int(inside.sum())


def memory_bytes(module: Module) -> float:
    """Bytes that operations read from HBM and write to it: each operand and result of each operation, without caches.

    Arrays in the vector memory are free; of an array that an operation only takes a slice of, the slice counts.
    """
    total = 0.0
    fused = {op.called["calls"] for op, _, _ in module.walk() if op.opcode == "fusion"}
    seen = set()
    for op, computation, times in module.walk():
        if computation.name in fused:
            # A collective that runs beside products is passed through the fusion of each, but moves once.
            channel = op.attribute(r"channel_id=(\d+)") or op.name
            if op.opcode in COLLECTIVE_KINDS and (op.opcode, channel) not in seen:
                seen.add((op.opcode, channel))
                total += times * _written_and_read(op, computation)
        elif op.opcode not in _FREE and not op.opcode.endswith("-done"):
            total += times * _moved(op, computation, module)
    return total


def _written_and_read(op: Instruction, computation: Computation) -> float:
    read = (_in_hbm(computation.instructions[name].arrays) for name in op.operands)
    return _in_hbm(op.arrays) + sum(read)


def _moved(op: Instruction, computation: Computation, module: Module) -> float:
    written = _in_hbm(op.arrays)
    read = [_in_hbm(computation.instructions[name].arrays) for name in op.operands if name in computation.instructions]
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if op.opcode == "dynamic-update-slice":
        return 2 * read[1] if len(read) > 1 else written
    if op.opcode == "copy-start":
        return sum(array.bytes for array in op.arrays[:1])
    if op.opcode in ("slice-start", "async-start"):
        return 0.0
    if op.opcode.endswith("-start"):
        return sum(read)
    if op.opcode == "fusion":
        inside = module.computations[op.called["calls"]]
        root = inside.root
        roots = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        taken = sum(_read_in_fusion(inside, number, size) for number, size in enumerate(read))
        return taken + sum(_written_in_fusion(inside, part) for part in roots)
    return written + sum(read)


def _read_in_fusion(inside: Computation, number: int, size: float) -> float:
    """The bytes read of parameter `number`: all of it, or the slices that are taken."""
    name = inside.parameter(number).name
    passed_on = ("tuple", *COLLECTIVE_KINDS)
    users = [op for op in inside.instructions.values() if name in op.operands and op.opcode not in passed_on]
    if not users:
        return 0.0
    if all(op.opcode in ("dynamic-slice", "gather") and op.operands[0] == name for op in users):
        return min(size, sum(array.bytes for op in users for array in op.arrays))
    if all(op.opcode == "dynamic-update-slice" and op.operands[0] == name for op in users):
        return 0.0
    return size


def _written_in_fusion(inside: Computation, part: Instruction) -> float:
    seen = part
    while seen.opcode in ("bitcast", "copy", "convert") and seen.operands:
        seen = inside.instructions[seen.operands[0]]
    if seen is part and (seen.opcode == "parameter" or seen.opcode in COLLECTIVE_KINDS):
        return 0.0
    if seen.opcode == "dynamic-update-slice":
        update = inside.instructions[seen.operands[1]]
        return sum(array.bytes for array in update.arrays)
    return _in_hbm(part.arrays)


def _in_hbm(arrays: tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


# How many products of the size queries x keys x head_dim each kernel of splash attention computes.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(module: Module, reaches: list[float]) -> float:
    """FLOPs of the attention kernels, which are only calls in the text.

    reaches: for each layer, how many keys a query sees on average over a row. Where layers differ, every layer has a
    branch for each different kernel and runs one of them.
    """
    kinds = len(set(reaches))
    reach = sum(reaches) / len(reaches)
    total = 0.0
    for op, computation, times in module.walk():
        products = next((n for name, n in _KERNELS.items() if name in op.name), None)
        if products and op.opcode == "custom-call":
            operands = (array for name in op.operands for array in computation.instructions[name].arrays)
            queries = max(math.prod(array.sides) for array in operands if array.dtype in ("bf16", "f32"))
            total += 2.0 * products * queries * reach * times / kinds
    return total
