"""Files that all processes of a run write together: all gather values, process 0 writes; see `ftjax.distributed`."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ftjax.atomic import new_directory
from ftjax.distributed import is_first, tell, together


@contextlib.contextmanager
def new_directory_together(out: Path) -> Iterator[Path]:
    """`atomic.new_directory`, made and renamed by process 0; all processes get its temporary path.

    The others may only read there, on a disk that they share, and only files that a `together` block has finished.
    """
    with contextlib.ExitStack() as stack:
        directory = None
        with together(f"making {out}"):
            if is_first():
                directory = stack.enter_context(new_directory(out))
        yield Path(tell(str(directory)))
        with together(f"writing {out}"):
            stack.close()


def gather(leaf: jax.Array | np.ndarray, index: tuple[int, ...], everywhere: bool = False) -> np.ndarray:
    """leaf[index] on the host of process 0, zeros in the others; all must ask for the same, in the same order.

    Only this part of the array is gathered from the devices that hold it, never the whole. everywhere: on every host,
    for what decides which parts are asked for next.
    """
    if not isinstance(leaf, jax.Array):
        return leaf[index]
    part = _gather(leaf.sharding)(leaf, *map(np.int32, index))
    if not everywhere and not is_first():
        part.block_until_ready()  # at most one part at a time is on the devices
        return np.zeros(part.shape, part.dtype)
    return np.asarray(part)


@functools.lru_cache(maxsize=64)
def _gather(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """Compiled once for all indices, which are traced."""
    out = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(lambda x, *index: jnp.asarray(x[index]), out_shardings=out)
