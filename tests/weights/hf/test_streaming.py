"""Loading holds little more than the weights themselves, and a process reads only what its devices hold."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import PYTHONPATH, SUPPORT, xla_flags
from support.tiny import CONFIG

from ftjax.models.families import spec_from_config
from ftjax.weights.hf import streaming
from ftjax.weights.hf.keys import hf_names

TIME_LIMIT = 400


def write_model(directory: Path, config: dict, shard_bytes: int) -> dict[str, tuple[int, ...]]:
    """Random float32 weights in shards; returns {name: shape}."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    keys = hf_names(spec_from_config(config)).values()
    shapes = {name: key.shape for key in keys for name in key.names()}
    rng = np.random.default_rng(0)
    waiting, weight_map = {}, {}

    def flush():
        shard = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(waiting, directory / shard)
        weight_map.update(dict.fromkeys(waiting, shard))
        waiting.clear()

    for name, shape in shapes.items():
        waiting[name] = rng.random(shape, np.float32) - np.float32(0.5)
        if sum(array.nbytes for array in waiting.values()) > shard_bytes:
            flush()
    if waiting:
        flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shapes


def run(cases: list, processes: int = 1) -> list[list[dict]]:
    """What each process says of each case; 8 devices in all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "XLA_FLAGS": xla_flags(8 // processes),
    }
    script = SUPPORT / "streaming_run.py"
    started = [
        subprocess.Popen(
            [sys.executable, script, json.dumps(cases), str(process), str(processes), str(port)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=TIME_LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for process, (_, errors) in zip(started, ended):
        assert process.returncode == 0, errors
    return [[json.loads(line) for line in out.splitlines()] for out, _ in ended]


WIDE = CONFIG | {
    "hidden_size": 2048,  # half a row of a kernel, 4 kB, is more than the gap that is read along
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
EXPERTS = CONFIG | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """{config: (directory, {name: shape})}"""
    root = tmp_path_factory.mktemp("small")
    return {
        name: (root / name, write_model(root / name, config, 2_000_000))
        for name, config in (("wide", WIDE), ("experts", EXPERTS))
    }


def sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: int(np.prod(shape)) for name, shape in shapes.items()}


def test_two_processes_read_half_of_the_weights_each(small):
    (wide, wide_shapes), (experts, expert_shapes) = small["wide"], small["experts"]
    cases = [
        (str(wide), {"fsdp": 8}, "float32", "host"),
        (str(wide), {"data": 2, "fsdp": 4}, "bfloat16", "host"),
        (str(experts), {"expert": 8}, "float32", "host"),
        (str(experts), {"expert": 4, "fsdp": 2}, "float32", "device"),
    ]
    first, second = run(cases, processes=2)
    assert len(first) == len(second) == 4

    whole = sizes(wide_shapes)
    for said in (first[0], second[0]):
        assert said["values"].keys() == whole.keys()
        norms = {name for name in whole if "norm" in name}  # the few values that are not split
        assert {name: 2 * count for name, count in said["values"].items() if name not in norms} == {
            name: count for name, count in whole.items() if name not in norms
        }
        assert 0.5 < said["read"] / (4 * sum(whole.values())) < 0.53
    for said in (first[1], second[1]):  # both hold everything
        assert said["values"] == whole

    whole = sizes(expert_shapes)
    for said, mine in ((first[2], range(4)), (second[2], range(4, 8))):
        others = {name for name in whole if ".experts." in name and int(name.split(".experts.")[1][0]) not in mine}
        assert len(others) == 2 * 3 * 4
        assert said["values"] == {name: count for name, count in whole.items() if name not in others}
    both = {name: first[3]["values"][name] + second[3]["values"][name] for name in whole if "norm" not in name}
    assert both == {name: whole[name] for name in both}
    assert all(said["compared"] > 0 and said["donated"] for said in [*first, *second])


def test_eight_devices_in_either_memory(small):
    """Devices of their own are what accelerators have; a CPU does as them here, and is slower at it."""
    cases = [
        (str(directory), mesh, dtype, memory)
        for mesh, directory, dtype in (
            ({"fsdp": 4, "tensor": 2}, small["wide"][0], "float32"),
            ({"data": 2, "expert": 2, "tensor": 2}, small["experts"][0], "bfloat16"),
            ({"data": 8}, small["wide"][0], "bfloat16"),
        )
        for memory in ("host", "device")
    ]
    [said] = run(cases)
    for case, one in zip(cases, said, strict=True):
        shapes = next(shapes for directory, shapes in small.values() if str(directory) == case[0])
        assert one["values"] == sizes(shapes), case  # each value is read once, however many devices hold it
        assert one["compared"] >= sum(sizes(shapes).values())
        assert one["donated"]


@pytest.fixture
def tensors():
    """float32 [layers, experts, in, out] and a `read` of its transposed tensors that keeps count."""
    whole = np.random.default_rng(0).standard_normal((2, 3, 40, 56), dtype=np.float32)
    count = np.zeros(whole.shape, int)

    def read(place, index):
        count[place].T[index] += 1
        return whole[place].T[index]

    return whole, read, count


@pytest.mark.parametrize("memory", ["_InHostMemory", "_InDeviceMemory"])
@pytest.mark.parametrize("block", [1, 100, 56 * 7, 10**6])
def test_blocks_of_any_size(tensors, monkeypatch, memory, block):
    """7 divides the 56 rows; 100 leaves blocks of different sizes."""
    monkeypatch.setattr(streaming, "BLOCK_VALUES", block)
    monkeypatch.setattr(streaming, "_target", getattr(streaming, memory))
    whole, read, count = tensors
    leaf = jax.ShapeDtypeStruct(whole.shape, jnp.float32)
    array = streaming.filled(leaf, read, depth=2, transposed=True)
    np.testing.assert_array_equal(array, whole)
    assert (count == 1).all()
    assert not array.committed
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, donate_argnums=0)(array), whole + 1)
    assert array.is_deleted()


def test_shards_in_device_memory_are_written_in_place():
    """Donation is what bounds the memory: the array stays where it is."""
    array = jnp.zeros((4, 64, 64))
    before = array.unsafe_buffer_pointer()
    for layer in range(4):
        array = streaming._write(array, np.full((1, 64, 64), layer, np.float32), np.array([layer, 0, 0]), None)
        assert array.unsafe_buffer_pointer() == before
    np.testing.assert_array_equal(array[:, 5, 7], [0, 1, 2, 3])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(directory, {name: shape}) of a Llama of 1.16 GB in float32, in four files."""
    config = CONFIG | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 5,
        "vocab_size": 16384,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
    }
    directory = tmp_path_factory.mktemp("large") / "model"
    shapes = write_model(directory, config, 250_000_000)
    assert len(list(directory.glob("*.safetensors"))) > 3
    yield directory, shapes
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "processes", "dtype"),
    [
        ({"fsdp": 8}, 1, "float32"),
        ({"fsdp": 4, "tensor": 2}, 1, "float32"),
        ({"fsdp": 8}, 1, "bfloat16"),
        ({"fsdp": 8}, 2, "float32"),
        ({"tensor": 8}, 2, "float32"),
    ],
)
def test_the_memory_it_takes(large, mesh, processes, dtype, record_figure):
    """At most 1.2 times this process's share of the weights and one tensor, by the kernel's own account."""
    directory, shapes = large
    total, largest = 4 * sum(sizes(shapes).values()), 4 * max(sizes(shapes).values())
    assert total > 2**30
    for process, [said] in enumerate(run([(str(directory), mesh, dtype, "host")], processes)):
        assert said["share"] == pytest.approx(total / processes * jnp.dtype(dtype).itemsize / 4, rel=0.001)
        record_figure(f"process {process}: peak / share", said["peak"] / said["share"])
        record_figure(f"process {process}: read / weights", said["read"] / total)
        record_figure(f"process {process}: GB/s", said["share"] / said["seconds"] / 1e9)
        assert said["peak"] <= 1.2 * said["share"] + largest
        assert said["peak"] >= 0.9 * said["share"]  # or it is not the load that was measured
        assert said["read"] == pytest.approx(total / processes, rel=0.02)
