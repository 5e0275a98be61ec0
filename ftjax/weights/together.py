"""What every process of a run does together when one of them, the first, writes files.

With a single process all of this is plain: nobody is waited for.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # for barriers with a time limit, which JAX offers nowhere else
from jax.errors import JaxRuntimeError
from jax.sharding import NamedSharding, PartitionSpec

from ftjax.weights.files import new_directory

LIMIT_SECONDS = 600.0  # how long one process waits for another

_numbers = itertools.count()  # of the meetings: the same in all processes, since all go through the same ones


@contextlib.contextmanager
def together(what: str, limit: float | None = None) -> Iterator[None]:
    """The processes end this block together: its failure in one of them is an OSError in all others.

    Raises OSError, too, when one has not come within `limit` seconds (by default LIMIT_SECONDS).
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        if jax.process_count() > 1:
            # A process that failed tells the others, whose error it is to raise; its own is already on the way.
            others = _meet(what, failed, LIMIT_SECONDS if limit is None else limit)
            if others and not failed:
                raise OSError(f"{what}: failed in process {', '.join(others)}; its own message says why")


def _meet(what: str, failed: bool, limit: float) -> list[str]:
    """The processes that have failed; OSError when not all come in time, unless this one has an error of its own."""
    client, name = distributed.global_state.client, f"ftjax/together/{next(_numbers)}"
    if failed:
        client.key_value_set(f"{name}/failed/{jax.process_index()}", "failed")
    try:
        client.wait_at_barrier(f"{name}/met", int(limit * 1000))
    except JaxRuntimeError as error:
        if failed:
            return []
        raise OSError(f"{what}: not all processes came within {limit:g} seconds ({error})") from error
    return sorted(key.rpartition("/")[2] for key, _ in client.key_value_dir_get(f"{name}/failed/"))


def tell(text: str | None, limit: float | None = None) -> str:
    """What the first process has in `text`, in every process (the others' own `text` does not matter)."""
    if jax.process_count() == 1:
        return text
    client, name = distributed.global_state.client, f"ftjax/tell/{next(_numbers)}"
    if jax.process_index() == 0:
        client.key_value_set(name, text)
    return client.blocking_key_value_get(name, int((LIMIT_SECONDS if limit is None else limit) * 1000))


@contextlib.contextmanager
def new_directory_together(out: Path) -> Iterator[Path]:
    """`files.new_directory`, made and renamed by the first process; all processes get its temporary path.

    The others may only read there, and only what a `together` block has finished, on a disk that they share.
    """
    with contextlib.ExitStack() as stack:
        directory = None
        with together(f"making {out}"):
            if jax.process_index() == 0:
                directory = stack.enter_context(new_directory(out))
        yield Path(tell(str(directory)))
        with together(f"writing {out}"):
            stack.close()


def gather(leaf: jax.Array | np.ndarray, place: tuple[int, ...]) -> np.ndarray:
    """leaf[place] on the host of the first process, zeros in the others; all must ask for the same, in the same order.

    Only this part of the array is gathered from the devices that hold it, never the whole.
    """
    if not isinstance(leaf, jax.Array):
        return leaf[place]
    part = _gather(leaf.sharding)(leaf, *map(np.int32, place))
    if jax.process_index() > 0:
        part.block_until_ready()  # at most one part at a time is on the devices
        return np.zeros(part.shape, part.dtype)
    return np.asarray(part)


@functools.lru_cache(maxsize=64)
def _gather(sharding: jax.sharding.Sharding):
    """Jitted once for all places, which are traced."""
    out = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(lambda x, *place: jnp.asarray(x[place]), out_shardings=out)
