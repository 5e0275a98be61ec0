"""Devices of a TPU slice that need not exist: libtpu describes it, and compiles for it."""

import math
import os
import re
from dataclasses import dataclass, replace

import jax

from ftjax.errors import UserError
from ftjax.planning.chips import CHIPS, Chip


@dataclass(frozen=True)
class Topology:
    """`slices` slices of chips in a grid of `sides`, joined by the data-center network."""

    chip: Chip
    sides: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sides))

    def less(self, size: float) -> "Topology":
        """The same with so many bytes of each chip taken."""
        return replace(self, chip=replace(self.chip, usable=self.chip.usable - size))

    def __str__(self) -> str:
        slice_name = f"{self.chip.name}:{self.shape}"
        return slice_name if self.slices == 1 else f"{self.slices}x {slice_name}"


def parse(text: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x2`; several slices as `2x v5e:4x4` or `v5e:4x4*2`. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+) *x +)?(v\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip())
    if not match or (match[1] and match[4]):
        raise UserError(f"--topology {text!r}: write it as v5e:4x4, v5p:2x2x2, or for two slices 2x v5e:4x4")
    if match[2] not in CHIPS:
        raise UserError(f"no TPU {match[2]!r}; there are {', '.join(CHIPS)}")
    chip, sides = CHIPS[match[2]], tuple(map(int, match[3].split("x")))
    slices = int(match[1] or match[4] or 1)
    if len(sides) != chip.dimensions or not all(sides) or not slices:
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(
            f"--topology {text!r}: a {chip.name} slice has {chip.dimensions} sides, as {chip.name}:{example}"
        )
    return Topology(chip, sides, slices)


def describe_to_libtpu(topology: Topology) -> None:
    """Sets what libtpu would otherwise ask a metadata server for; call it before the first `devices` of a process.

    Several processes may plan at a time: no chip is used, so libtpu's lock (/tmp/libtpu_lockfile) guards nothing.
    """
    chip = topology.chip
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{math.prod(topology.sides) * chip.cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")  # libtpu warns that this machine is no TPU
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def devices(topology: Topology) -> list[jax.Device]:
    """The slice's devices, for compiling only. Raises UserError without libtpu, and for a slice that does not exist."""
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("planning compiles with libtpu; install it: pip install 'ftjax[plan]'") from None
    describe_to_libtpu(topology)
    options = {"chip_config_name": topology.chip.config} if topology.chip.config != "default" else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        described = topologies.get_topology_desc(f"{topology.chip.name}:{topology.shape}", "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology {topology}: libtpu knows no such slice ({str(error).splitlines()[0]})") from error
    if len(described) != topology.chips or described[0].device_kind != topology.chip.devices:
        raise UserError(f"--topology {topology}: libtpu gives {len(described)} x {described[0].device_kind}")
    return described


def slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0
