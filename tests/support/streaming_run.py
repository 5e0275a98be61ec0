"""Loads models as a process of its own and says, in a line of JSON each, what that took.

    python streaming_run.py CASES PROCESS PROCESSES PORT

CASES is JSON: a list of [directory, mesh sizes, dtype, memory], memory "host" or "device". Every shard of every array
is compared, after the measurement, with what the safetensors library reads.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.weights.hf import streaming
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


def main(cases: str, process: str, processes: str, port: str) -> None:
    if processes != "1":
        address = f"127.0.0.1:{port}"
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(processes), int(process), coordinator_bind_address=address)
    choose = streaming._target
    for directory, sizes, dtype, memory in json.loads(cases):
        streaming._target = {"host": choose, "device": streaming._InDeviceMemory}[memory]
        print(json.dumps(measured(Path(directory), sizes, dtype)), flush=True)


class Counting:
    """A reader that keeps count of the values it is asked for."""

    def __init__(self, reader):
        self.path, self.config, self.names = reader.path, reader.config, reader.names
        self.shape, self.dtype, self._read = reader.shape, reader.dtype, reader.read
        self.values: dict[str, int] = {}

    def read(self, name, index):
        values = self._read(name, index)
        self.values[name] = self.values.get(name, 0) + values.size
        return values


def measured(directory: Path, sizes: dict[str, int], dtype: str) -> dict:
    reader = Counting(open_source(directory))
    spec = spec_from_config(reader.config)
    mesh = sharding.make_mesh(sizes)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding),
        abstract_params(Decoder(spec), mesh),
    )
    jax.block_until_ready(jax.jit(jnp.zeros, static_argnums=0)(8))  # so that the base has what JAX always takes
    Path("/proc/self/clear_refs").write_text("5")  # the highest RSS so far is now the present one
    before, read = status("VmRSS"), characters_read()
    start = time.perf_counter()
    params = jax.block_until_ready(load_params(reader, spec, abstract))
    seconds, peak, read = time.perf_counter() - start, status("VmHWM") - before, characters_read() - read

    arrays = tree.flatten(params)
    # Devices of one CPU may share the memory of what they hold alike, which is then there once.
    shards = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays.values() for s in a.addressable_shards}
    return {
        "seconds": seconds,
        "peak": peak,
        "share": sum(shards.values()),
        "read": read,
        "values": reader.values,
        "compared": compared(directory, spec, arrays, dtype),
        "donated": donated(arrays["norm/scale"]),
    }


def donated(array: jax.Array) -> bool:
    """Whether a step that is given `array` to write its result into does so without harm, shared memory or not."""
    once = np.asarray(array.addressable_shards[0].data) + 1  # the array is whole on every device
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    return array.is_deleted() and all((np.asarray(shard.data) == once).all() for shard in after.addressable_shards)


def compared(directory: Path, spec, arrays: dict[str, jax.Array], dtype: str) -> int:
    """The number of values that are compared."""
    opened = [safe_open(path, "numpy") for path in directory.glob("*.safetensors")]
    files = {name: file for file in opened for name in list(file.keys())}
    count = 0
    for path, key in hf_names(spec).items():
        depth = len(key.stack)
        for place in key.places():
            whole = files[key.name(place)].get_tensor(key.name(place))
            whole = (whole.T if key.transposed else whole).astype(dtype)
            for shard in arrays[path].addressable_shards:
                chosen = [range(n)[part] for part, n in zip(shard.index, key.stack)]
                if all(i in part for i, part in zip(place, chosen)):
                    local = tuple(part.index(i) for i, part in zip(place, chosen))
                    expected = whole[shard.index[depth:]]
                    np.testing.assert_array_equal(np.asarray(shard.data)[local], expected, key.name(place))
                    count += expected.size
    return count


def status(field: str) -> int:
    """In bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def characters_read() -> int:
    """Bytes that this process has had from read calls, cached or not; what it sees through memory maps is not there."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
