"""The mesh, and the one table that says which mesh axes a logical axis of a parameter or activation is split over.

Models name their axes logically ("embed", "mlp", "batch"); nothing outside this file knows about mesh axes.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ftjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),  # the model width, on the side of a kernel that is not split over tensor
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "width": (),  # the model width of an activation: whole on every device, since batch already uses fsdp
}


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; `sizes` gives each of `MESH_AXES` a size, at most one of them -1 (what is left).

    Raises UserError when the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(MESH_AXES):
        raise UserError(f"mesh has no axis {sorted(unknown)}; its axes are {', '.join(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f"mesh {sizes}: sizes are positive, and at most one may be -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape) if size != 1) or "1 device"
        raise UserError(f"mesh {asked} does not fit {len(devices)} {devices[0].platform} device(s); set one axis to -1")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Logical axes of one array -> PartitionSpec.

    A dimension that its mesh axes do not divide stays whole (9 heads over tensor=2, an odd vocabulary): `undivided`
    lists those so that a run can say so. One mesh axis used twice in an array, or an unknown logical axis, is an error.
    """
    entries, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(name for name in _rule(axis) if mesh.shape[name] > 1)
        if clash := used & set(mesh_axes):
            raise ValueError(f"logical axes {axes} use mesh axis {sorted(clash)} twice")
        if size % math.prod(mesh.shape[name] for name in mesh_axes):
            mesh_axes = ()
        used |= set(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)


def undivided(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> list[str]:
    """The logical axes that `partition_spec` had to leave whole, as "vocab (49153 over 2)"."""
    wanted = [(axis, size, math.prod(mesh.shape[name] for name in _rule(axis))) for axis, size in zip(axes, shape)]
    return [f"{axis} ({size} over {parts})" for axis, size, parts in wanted if size % parts]


def named(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation to its logical axes; does nothing outside `jax.set_mesh` (tests, single-device use)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def place(mesh: Mesh, axes: tuple[str | None, ...], array: np.ndarray) -> jax.Array:
    """A host array that every process holds -> a global array; each device copies only its own part."""
    sharding = named(mesh, axes, array.shape)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _rule(axis: str | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in RULES:
        raise ValueError(f"unknown logical axis {axis!r}; sharding.RULES has {', '.join(RULES)}")
    return RULES[axis]
