"""What the reference says of every document, asked once before the first step and kept for all later runs.

A step then makes no forward pass of a reference, and none is held. What is kept is one number of each document, log p
of its trained tokens, in the order of the examples: a file of $FTJAX_CACHE/reference, whose name is a digest of all
that decides them but for rounding. So runs that differ in their objective, their optimizer, the size of their batches
or their adapters share it, and one that goes on with another adapter, base, data, template or cut does not.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import ftjax
from ftjax import cache, distributed, memory, sharding
from ftjax import config as configs
from ftjax.assemble import Program
from ftjax.data.batch.loader import Loader
from ftjax.data.tokens.examples import Examples
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import pair_sums, token_logps
from ftjax.training.display import Display
from ftjax.training.preemption import Preemption
from ftjax.tree import Tree

_EVERY = 60.0  # seconds after which what is done so far is kept, in case the run is killed
# The parts of this package that decide the numbers.
_DECIDING = ("models", "objectives", "weights", "lora.py", "quant.py")


def file_of(config: ConfigDict, contents: Mapping[str, str], examples: Examples, platform: str) -> Path:
    """Where the numbers of `examples` are kept.

    contents: digests of base and adapter (`origin.contents`); platform: that of the devices, whose products differ in
    precision. Kernels of attention, meshes and batches are not in the name, since they change the rounding alone, nor
    are fresh adapters, under which the reference is the base; but PiSSA's, which take their part out of it.
    """
    model, adapter = config.model, configs.as_json(config)["adapter"]
    parts = {part: contents.get(part) for part in ("weights", "config", "adapter")}
    parts["pissa"] = adapter | {"source": ""} if config.adapter.init == "pissa" else None
    numbers = [model.dtype, model.param_dtype, model.matmul, config.quantize.base, platform]
    how = [*numbers, list(model.add_tokens), model.resize_vocab]
    digest = hashlib.sha256(json.dumps([parts, how, _code(), examples.digest], sort_keys=True).encode())
    return cache.directory("reference") / f"{digest.hexdigest()}.f32"


def _code() -> str:
    root, digest = Path(ftjax.__file__).parent, hashlib.sha256()
    for path in (root / name for name in _DECIDING):
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def add(
    config: ConfigDict,
    contents: Mapping[str, str],
    program: Program,
    variables: Tree,
    loader: Loader,
    display: Display,
    preemption: Preemption,
) -> None:
    """Gives the examples of `loader`, which are pairs, what the reference says of them, from the cache or computed.

    variables: those that training starts from. Every process of a run calls it alike, under its mesh; each keeps a file
    of its own where they do not share one. After SIGTERM it raises Preempted between two batches. What was done by
    then, or up to a minute before the process was killed, is not done again.

    Raises:
      UserError: the memory of a device does not suffice, the cache cannot be written, or a number is not finite.
    """
    examples, what = loader.examples, f"the reference's log-probabilities of {len(loader.examples):,} pairs"
    path = file_of(config, contents, examples, sharding.platform(program.mesh))
    found = _known(path, examples)
    if missing := int(np.isnan(found).any(axis=1).sum()):
        display.say(f"computing {what}" + (f", of which {missing:,} are missing" if missing < len(examples) else ""))
        began = time.monotonic()
        with memory.exhausted(f"computing {what}", memory.smaller(config, program.mesh)):
            _complete(found, path, program, variables, _in_order(loader, config), display, preemption)
        display.say(f"computed in {time.monotonic() - began:.0f} seconds, and kept in {path}")
    else:
        display.say(f"{what} are those of {path}")
    if (wrong := np.flatnonzero(~np.isfinite(found).all(axis=1))).size:
        row, logps = examples.origin(int(wrong[0])), found[wrong[0]]
        raise UserError(
            f"{row}: the reference gives its answers the log-probabilities {logps.tolist()}; remove the row"
        )
    loader.examples = dataclasses.replace(examples, reference_logps=found)


def _known(path: Path, examples: Examples) -> np.ndarray:
    """float32 [N, 2]: what is kept, NaN where that is nothing; the same in every process."""
    shape = examples.document_lengths.shape
    found = cache.read_array(path, shape)
    digest, limit = hashlib.sha256(b"" if found is None else found.tobytes()).hexdigest(), distributed.LOADING_SECONDS
    digests = distributed.collect(digest, limit)
    same = json.loads(distributed.tell(json.dumps(len(set(digests)) == 1), limit))
    return np.full(shape, np.nan, np.float32) if found is None or not same else found.copy()


def _in_order(loader: Loader, config: ConfigDict) -> Loader:
    """Every example once, in batches like the micro-batches of training, which fit the memory."""
    rows, seed = config.data.batch_size // config.accumulate, loader.seed
    order = loader.packing, seed, False, loader.multiple
    return Loader(loader.examples, rows, loader.max_length, *order, shares=loader.shares)


def _complete(
    found: np.ndarray,
    path: Path,
    program: Program,
    variables: Tree,
    loader: Loader,
    display: Display,
    preemption: Preemption,
) -> None:
    """Fills the places of `found` that are NaN, and writes it."""
    mesh, mine = program.mesh, sharding.local_rows(program.mesh, loader.batch_size)
    done, kept = 0, time.monotonic()
    with display.counter("reference", len(found)) as advance:
        try:
            for rows in loader.eval_rows():
                done += sum(map(len, rows))
                if np.isnan(found[np.concatenate(rows)]).any():
                    preemption.check()
                    batch = loader.fill(rows, mine)
                    placed = sharding.placed(mesh, batch)
                    sums = np.asarray(_sums(program.model, variables, placed))
                    for row, values in zip(rows, sums, strict=True):
                        found[row] = values[: len(row)]
                advance(done)
                if time.monotonic() > kept + _EVERY:
                    cache.write_array(path, found)
                    kept = time.monotonic()
        finally:
            cache.write_array(path, found)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Decoder, variables: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, P, 2]: of the pairs in each row, whole in every process."""
    logps = token_logps(model, make_unembed(model), variables, batch, None)
    return sharding.constrain(jnp.stack(pair_sums(logps, batch["segment_ids"]), axis=-1), None, None, None)
