"""The published figures of each kind of TPU chip, from which a plan is computed."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Rates in units per second and chip.

    Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for memory, FLOPs and the data-center network; links and their
    one-way bandwidth as in "How to Scale Your Model" (Austin et al. 2025, jax-ml.github.io/scaling-book/tpus), which
    are about a tenth below the data sheets' and nearer to what a collective reaches.
    """

    name: str
    devices: str  # `device_kind` of JAX's devices
    hbm: float  # bytes; `usable` of them are the program's, as the compiler says when one does not fit
    usable: float
    flops: float  # bfloat16, dense
    hbm_bandwidth: float  # bytes/s
    link: float  # bytes/s of one ICI link, in one direction
    dimensions: int  # of the torus
    dcn: float  # bytes/s out of a chip to another slice
    wraps: int  # a side of the topology is a ring where its length is a multiple of this, a line otherwise
    accelerator: str  # TPU_ACCELERATOR_TYPE of a slice, without the number of its cores
    cores: int  # of each chip, as counted in that number
    config: str = "default"  # libtpu's chip_config_name: one device per chip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32 * GIB, 30.75 * GIB, 275e12, 1.2e12, 4.5e10, 3, 6.25e9, 4, "v4", 2, "megacore"),
        Chip("v5e", "TPU v5 lite", 16 * GIB, 15.75 * GIB, 197e12, 8.1e11, 4.5e10, 2, 3.125e9, 16, "v5litepod", 1),
        Chip("v5p", "TPU v5", 95.74 * GIB, 95.73 * GIB, 459e12, 2.765e12, 9e10, 3, 6.25e9, 4, "v5p", 2),
        Chip("v6e", "TPU v6 lite", 32 * GIB, 31.24 * GIB, 918e12, 1.6e12, 9e10, 2, 1.25e10, 16, "v6e", 1),
    )
}
