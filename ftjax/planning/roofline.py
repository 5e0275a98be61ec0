"""The least time that a step can take on a chip, and which of its limits sets it."""

import math
from dataclasses import dataclass

from ftjax.planning.topology import Topology
from ftjax.planning.traffic import Collective


@dataclass(frozen=True)
class Roofline:
    """The seconds of each resource, for one chip and step, as if nothing else took time."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def terms(self) -> dict[str, float]:
        return {"compute": self.compute, "HBM": self.memory, "ICI": self.ici, "DCN": self.dcn}

    @property
    def step(self) -> float:
        return max(self.terms.values())

    @property
    def bound(self) -> str:
        return max(self.terms, key=self.terms.__getitem__)


def roofline(topology: Topology, flops: float, moved: float, collectives: list[Collective]) -> Roofline:
    """flops, moved: of one chip, recomputation included; moved in bytes of HBM."""
    chip = topology.chip
    ici = sum(collective.ici / bandwidth(topology, collective.rings) for collective in collectives if collective.ici)
    dcn = sum(collective.dcn for collective in collectives) / chip.dcn
    return Roofline(flops / chip.flops, moved / chip.hbm_bandwidth, ici, dcn)


def bandwidth(topology: Topology, rings: tuple[int, ...]) -> float:
    """Bytes/s into a chip from a group that spans these dimensions of the torus.

    A ring brings data from both sides; the ends of a line have one neighbor, and the slowest chip sets the pace.
    """
    chip = topology.chip
    links = sum(2 if is_ring(topology, dimension) else 1 for dimension in rings if dimension < len(topology.sides))
    return chip.link * max(links, 1)


def is_ring(topology: Topology, dimension: int) -> bool:
    """Whether a side of the slice is closed: multiples of 16 on a v5e or v6e; whole cubes of 4 on a v4 or v5p."""
    chip, sides = topology.chip, topology.sides
    if chip.dimensions == 3:
        return math.prod(sides) >= 64 and all(side % chip.wraps == 0 for side in sides)
    return sides[dimension] % chip.wraps == 0


ASSUMPTIONS = (
    "compute: every matrix product at the chip's bfloat16 peak, recomputation included",
    "HBM: operands and results of every operation once, nothing kept in caches between operations",
    "ICI: one-way link bandwidth, both directions where the torus closes, over the dimensions that a mesh axis spans",
    "DCN: each chip has its share of its host's network, which sends and receives at the same time",
    "overlap: the four are hidden behind each other perfectly, so the step takes as long as the longest of them",
    "tokens: every position of every row holds a token, each row one document (packing needs less attention)",
    "not counted: the input pipeline, checkpoints, latencies, and the optimizer's arithmetic",
)
