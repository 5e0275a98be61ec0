"""The mesh, and the one table from logical axes of parameters and activations to the mesh axes that split them.

Models name their axes logically ("embed", "mlp", "batch"); nothing outside this file knows about mesh axes.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ftjax.errors import UserError

AnyMesh = Mesh | AbstractMesh
HOST_MEMORY = "pinned_host"
MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp", "context"),  # the model width, on the side of a kernel that is not split over tensor
    "table": ("fsdp",),  # the width of an embedding: over one axis, so that a look-up needs one exchange
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp", "expert"),  # outside the mixtures the devices of `expert` have their own rows, too
    "replica": ("data",),  # the rows of the devices that together hold one copy of an embedding
    "length": ("context",),
    "width": (),  # the model width of an activation: whole on every device, since batch already uses fsdp
}


# Of the arrays of a batch those that do not lie as tokens do, [batch, length].
_ARRAYS: dict[str, tuple[str | None, ...]] = {
    "patches": ("batch", None, None),
    "patch_places": ("batch", None, None),
    "patch_images": ("batch", None),
    "rope_positions": ("batch", "length", None),
}


def make_mesh(sizes: dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. `sizes` are of `MESH_AXES`, 1 by default; at most one is -1, for what is left.

    Raises UserError if the product is not the number of devices.
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
    return Mesh(_arranged(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: list[int], devices: list[jax.Device]) -> np.ndarray:
    """The devices as an array of `shape`, with neighbors in the network next to each other.

    The network between TPU slices is slow, so only `data`, which needs it least, may span slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(
            f"mesh data={shape[0]} over {slices} TPU slices: only data is split over the network between slices; "
            f"set config.mesh.data to a multiple of {slices}"
        )
    within = [shape[0] // slices, *shape[1:]]
    between = [slices] + [1] * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    A dimension that its mesh axes do not divide stays whole (9 heads over tensor=2, an odd vocabulary); `undivided`
    lists those for the user. ValueError for a mesh axis used twice or an unknown logical axis.
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


def batch_axes(name: str) -> tuple[str | None, ...]:
    """The logical axes of an array of a batch."""
    return _ARRAYS.get(name, ("batch", "length"))


def undivided(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> list[str]:
    """The logical axes that `partition_spec` leaves whole, as "vocab (49153 over 2)"."""
    wanted = [(axis, size, math.prod(mesh.shape[name] for name in _rule(axis))) for axis, size in zip(axes, shape)]
    return [f"{axis} ({size} over {parts})" for axis, size, parts in wanted if size % parts]


def named(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array with these logical axes, see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def platform(mesh: AnyMesh) -> str:
    """cpu, gpu or tpu: the devices that a program is compiled for, which this machine may not have."""
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    return jax.default_backend() if device is None else device.platform


def row_parts(mesh: AnyMesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check_host_memory(mesh: Mesh) -> None:
    """UserError if the devices cannot offload to their hosts' memory."""
    device = mesh.devices.flat[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"offloading needs {HOST_MEMORY} memory, which {device.device_kind} ({device.platform}) does not have in "
            "this version of JAX; choose another config.model.remat"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Shards an activation by its logical axes; does nothing outside `jax.set_mesh` (tests, one device)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def place(mesh: Mesh, axes: tuple[str | None, ...], array: np.ndarray) -> jax.Array:
    """A host array that every process holds -> a global array; each device copies only its own part."""
    sharding = named(mesh, axes, array.shape)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The arrays of a batch, [rows, ...], each as `place` has it."""
    return {name: place(mesh, batch_axes(name), array) for name, array in batch.items()}


def local_rows(mesh: Mesh, rows: int, accumulate: int = 1) -> list[int] | None:
    """Which rows of a batch of `rows`, the micro-batches in order, this process's devices hold; None: all."""
    if jax.process_count() == 1:
        return None
    shape = (accumulate, rows // accumulate)
    indices = named(mesh, (None, "batch"), shape).addressable_devices_indices_map(shape).values()
    columns = {column for _, part in indices for column in range(*part.indices(shape[1]))}
    return [row for row in range(rows) if row % shape[1] in columns]


def _rule(axis: str | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in RULES:
        raise ValueError(f"unknown logical axis {axis!r}; sharding.RULES has {', '.join(RULES)}")
    return RULES[axis]
