"""The rules from logical axes to mesh axes. What they do to real arrays is in test_invariance.py."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from ftjax import sharding
from ftjax.errors import UserError

BATCH = ("data", "expert")


def mesh(**sizes):
    """A mesh of sizes only: rules need no devices."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)


def fake_devices(count):
    return [SimpleNamespace(platform="cpu", id=index) for index in range(count)]


def test_one_device_needs_no_sizes():
    made = sharding.make_mesh({}, jax.devices()[:1])
    assert made.axis_names == sharding.MESH_AXES
    assert made.size == 1
    assert sharding.make_mesh({"fsdp": -1}, jax.devices()[:1]).shape["fsdp"] == 1


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ({"fsdp": 3}, 8, r"mesh fsdp=3 does not fit 8 cpu device\(s\)"),
        ({"fsdp": 4, "tensor": 4}, 8, r"mesh fsdp=4 x tensor=4 does not fit 8"),
        ({}, 8, r"mesh 1 device does not fit 8"),
        ({"fsdp": -1, "tensor": 3}, 8, r"does not fit 8"),
        ({"fsdp": -1, "tensor": 16}, 8, r"does not fit 8"),
        ({"fsdp": -1, "data": -1}, 8, r"at most one may be -1"),
        ({"fsdp": 0}, 8, r"sizes are positive"),
        ({"fsdp": -2}, 8, r"sizes are positive"),
        ({"fdsp": 8}, 8, r"no axis \['fdsp'\]; its axes are data, fsdp"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, count, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes, fake_devices(count))


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("embed", "heads"), (64, 32), {"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
        (("layers", "mlp", "embed"), (2, 48, 64), {"fsdp": 4, "tensor": 2}, (None, "tensor", "fsdp")),
        (("embed", "heads"), (64, 32), {"fsdp": 8}, ("fsdp", None)),
        (("embed", "heads"), (64, 32), {}, (None, None)),
        (("batch", "length", "width"), (8, 16, 64), {"data": 2, "fsdp": 4}, (("data", "fsdp"), None, None)),
        (("batch", "length"), (8, 16), {"data": 2}, ("data", None)),
        (("batch", "length", "width"), (8, 16, 64), {"data": 2, "expert": 2, "context": 2}, (BATCH, "context", None)),
        (("embed", "heads"), (64, 32), {"fsdp": 4, "context": 2}, (("fsdp", "context"), None)),
        (("experts", "embed", "mlp"), (4, 64, 32), {"fsdp": 2, "expert": 2, "tensor": 2}, ("expert", "fsdp", "tensor")),
        (("vocab", "table"), (64, 32), {"fsdp": 4, "context": 2}, (None, "fsdp")),
        ((None, "batch"), (4, 8), {"fsdp": 8}, (None, "fsdp")),
        (("norm",), (64,), {"fsdp": 8}, (None,)),
        # What does not divide stays whole.
        (("embed", "heads"), (64, 9), {"fsdp": 4, "tensor": 2}, ("fsdp", None)),
        (("batch", "length"), (4, 16), {"data": 2, "fsdp": 4}, (None, None)),
        ((), (), {"fsdp": 8}, ()),
    ],
)
def test_partition_spec(axes, shape, sizes, expected):
    assert sharding.partition_spec(axes, shape, mesh(**sizes)) == PartitionSpec(*expected)


def test_an_unknown_logical_axis_is_an_error_on_every_mesh():
    for sizes in ({}, {"fsdp": 8}):
        with pytest.raises(ValueError, match=r"unknown logical axis 'embde'; sharding\.RULES has layers, embed"):
            sharding.partition_spec(("embde",), (64,), mesh(**sizes))


def test_one_mesh_axis_twice_in_an_array_is_an_error():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) use mesh axis \['tensor'\] twice"):
        sharding.partition_spec(("heads", "mlp"), (64, 64), mesh(tensor=2))
    with pytest.raises(ValueError, match=r"mesh axis \['fsdp'\] twice"):
        sharding.partition_spec(("batch", "embed"), (64, 64), mesh(data=2, fsdp=4))


def test_an_axis_for_every_dimension():
    with pytest.raises(ValueError, match="longer"):
        sharding.partition_spec(("embed",), (64, 64), mesh())


def test_undivided_names_what_stays_whole():
    axes, shape = ("vocab", "embed"), (49153, 576)
    assert sharding.undivided(axes, shape, mesh(fsdp=4, tensor=2)) == ["vocab (49153 over 2)"]
    assert sharding.undivided(axes, shape, mesh(fsdp=5, tensor=2)) == ["vocab (49153 over 2)", "embed (576 over 5)"]
    assert sharding.undivided(axes, shape, mesh(fsdp=4)) == []


def test_place_copies_a_host_array():
    made = sharding.make_mesh({}, jax.devices()[:1])
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    placed = sharding.place(made, ("batch", "length"), array)
    np.testing.assert_array_equal(placed, array)
    assert placed.dtype == np.int32


def test_rows_are_split_over_data_fsdp_and_expert():
    assert sharding.row_parts(mesh(data=2, fsdp=4, tensor=8, context=16, expert=3)) == 24
    assert sharding.row_parts(mesh()) == 1


def test_the_platform_is_that_of_the_mesh():
    made = sharding.make_mesh({}, jax.devices()[:1])
    assert sharding.platform(made) == sharding.platform(made.abstract_mesh) == sharding.platform(mesh()) == "cpu"
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    elsewhere = AbstractMesh((1,) * 5, sharding.MESH_AXES, abstract_device=device)
    assert sharding.platform(elsewhere) == "tpu"


def test_slices_of_tpus_are_joined_by_data_only():
    devices = [SimpleNamespace(platform="tpu", id=index, slice_index=index // 4) for index in range(8)]
    with pytest.raises(UserError, match=r"over 2 TPU slices.*config\.mesh\.data to a multiple of 2"):
        sharding.make_mesh({"fsdp": -1}, devices)
    with pytest.raises(UserError, match=r"mesh data=1 over 2 TPU slices"):
        sharding.make_mesh({"tensor": 8}, devices)


def test_host_memory_is_asked_for_before_it_is_used():
    sharding.check_host_memory(sharding.make_mesh({}, jax.devices()[:1]))
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(platform="gpu", device_kind="Old GPU", addressable_memories=lambda: [memory])
    without = SimpleNamespace(devices=np.array([device], dtype=object))
    with pytest.raises(UserError, match=r"Old GPU \(gpu\) does not have .*choose another config\.model\.remat"):
        sharding.check_host_memory(without)


def test_constrain_outside_a_mesh_does_nothing():
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, "batch", "length") is x
