"""Digests of a checkpoint's contents, because Orbax loads arrays with a flipped bit without an error.

A step's record, `digests.json`, holds crc32s of two kinds:

- of each leaf, taken from the arrays in memory: so what is restored is what training had, whatever happened between.
  The bytes are those of the global array in C order, so the crc32 does not depend on the sharding or the number of
  processes, and is valid after a restore on another mesh. Each process digests its own blocks (`crc`), and the first
  one joins them.
- of each file, compared before Orbax opens any: damage is then reported by the name of the file, and not as some
  exception from deep in a parser.
"""

import functools
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.training import crc

FILE = "digests.json"
_Blocks = list[tuple[tuple[slice, ...], np.ndarray]]


def flatten(tree: Any) -> dict[str, Any]:
    """{"a/b/0/c": leaf} of any pytree; None and empty nodes have no leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves have the same path; a key may not contain '/'")
    return flat


def describe(leaf: Any) -> dict[str, Any]:
    """{"shape": [...], "dtype": "bfloat16"} of an array or a ShapeDtypeStruct."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def host_blocks(arrays: list[jax.Array]) -> list[_Blocks]:
    """Each array as (global index, host data) blocks; starts all transfers before waiting for one.

    This process returns the blocks that its devices hold; those of all processes together cover each array once.

    The host data is what `np.asarray(shard.data)` caches on the shard, so Orbax, which asks for the same, copies
    nothing a second time. A block may be a view of a CPU device's buffer: JAX does not donate a buffer that is
    viewed, so the block keeps its values whatever happens to the array.
    """
    blocks = [[shard for shard in array.addressable_shards if shard.replica_id == 0] for array in arrays]
    for shard in itertools.chain.from_iterable(blocks):
        shard.data.copy_to_host_async()
    return [[(shard.index, np.asarray(shard.data)) for shard in shards] for shards in blocks]


def parts(leaves: dict[str, Any], blocks: list[_Blocks]) -> list[int]:
    """What this process's `blocks` contribute to the crc32 of each leaf, in order."""
    return [
        functools.reduce(int.__xor__, (crc.of_block(leaf.shape, *block) for block in leaf_blocks), 0)
        for leaf, leaf_blocks in zip(leaves.values(), blocks, strict=True)
    ]


def of_leaves(leaves: dict[str, Any], process_parts: list[list[int]]) -> dict[str, dict]:
    """{path: {shape, dtype, crc32}} from the `parts` of all processes."""
    return {
        path: {**describe(leaf), "crc32": crc.of_whole(leaf.size * leaf.dtype.itemsize, leaf_parts)}
        for (path, leaf), *leaf_parts in zip(leaves.items(), *process_parts, strict=True)
    }


def of_file(path: Path) -> str:
    """crc32 of a file's content, in 8 hex digits."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def files_of(directory: Path) -> list[str]:
    """The files of a step, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def write(directory: Path, step: int, leaves: dict[str, dict], files: dict[str, str]) -> None:
    """Write the record of a step: {"body": text, "crc32": of that text}. files: the crc32 of every other file."""
    body = json.dumps({"step": step, "leaves": leaves, "files": files})
    (directory / FILE).write_text(json.dumps({"body": body, "crc32": f"{zlib.crc32(body.encode()):08x}"}))


def read(directory: Path) -> dict[str, Any]:
    """{"step", "leaves": {path: {shape, dtype, crc32}}, "files": {path: crc32}} as `write` wrote it.

    Raises ValueError, whose message names the file, where the record itself is missing or damaged.
    """
    path = directory / FILE
    try:
        record = json.loads(path.read_bytes())
        if f"{zlib.crc32(record['body'].encode()):08x}" == record["crc32"]:
            return json.loads(record["body"])
    except FileNotFoundError as error:
        raise ValueError(f"{FILE} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{FILE} is damaged ({type(error).__name__})") from error
    raise ValueError(f"{FILE} is damaged (its crc32 does not match)")


def wrong_files(directory: Path, files: dict[str, str]) -> list[str]:
    """Those of `files` (from a record) that are missing, unreadable or changed. Other files may exist."""

    def intact(name: str) -> bool:
        try:
            return of_file(directory / name) == files[name]
        except OSError:  # missing, or a sector that the disk cannot read
            return False

    return [name for name in files if not intact(name)]


def differences(saved: dict[str, dict], wanted: dict[str, dict]) -> list[str]:
    """One line for each path, shape or dtype in which the saved leaves differ from the wanted ones."""

    def form(leaf: dict) -> str:
        return f"{leaf['dtype']}{leaf['shape']}"

    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
        if path not in wanted:
            lines.append(f"{path}: saved as {form(saved[path])}, not in this run")
        elif path not in saved:
            lines.append(f"{path}: {form(wanted[path])} in this run, not in the checkpoint")
        elif form(saved[path]) != form(wanted[path]):
            lines.append(f"{path}: saved as {form(saved[path])}, {form(wanted[path])} in this run")
    return lines
