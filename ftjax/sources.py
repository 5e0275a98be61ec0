"""Where the batches of a run come from, by the name that its method gives (`method.Method.source`)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, sharding
from ftjax import config as configs
from ftjax.assemble import Base, Program
from ftjax.data import pipeline
from ftjax.data.batch.loader import Loader
from ftjax.data.pipeline import DataSpec
from ftjax.data.tokens.kinds import PLAIN
from ftjax.distillation import Distilled
from ftjax.method import ptx_rows
from ftjax.rollouts import Rollouts
from ftjax.selected import Selected
from ftjax.training.source import FileSource, Source
from ftjax.tree import Tree


class Parts(NamedTuple):
    """What a source may be made of.

    Attributes:
      loader: of the rows of data.train.
      ptx: of those of data.ptx, None where there are none.
      steps: how many there are.
      between: called while the model writes, to raise what ends that (`training.preemption`).
    """

    config: ConfigDict
    base: Base
    program: Program
    frozen: Tree
    loader: Loader
    ptx: Loader | None
    workdir: Path
    steps: int
    between: Callable[[], None]


def ptx_loader(config: ConfigDict, base: Base, mesh: Mesh, counter: pipeline.Counter) -> Loader | None:
    """The loader of the rows of data.ptx; None where there are none."""
    if not config.data.ptx:
        return None
    spec = ptx_spec(config, assemble.data_spec(config, base.model.spec, mesh, base.images))
    return pipeline.load(configs.sources(config, "ptx"), base.tokenizer, spec, counter)[0]


def ptx_spec(config: ConfigDict, spec: DataSpec) -> DataSpec:
    """How the rows of data.ptx lie in batches: as in supervised tuning; spec: of those of data.train.

    Their documents are at most as long as a prompt with its completion may be.
    """
    rows, length = ptx_rows(config), config.data.row_length
    as_conversations = {"kind": "conversation", "max_length": length, "settings": PLAIN}
    return dataclasses.replace(spec, **as_conversations, batch_size=rows, packing=config.data.packing)


def fingerprint(loader: Loader, ptx: Loader | None) -> str:
    """sha256 (hex) of all that decides the batches of training, apart from the model."""
    return loader.fingerprint() if ptx is None else f"{loader.fingerprint()}+{ptx.fingerprint()}"


def _from_files(run: Parts) -> Source:
    rows = sharding.local_rows(run.program.mesh, run.config.data.batch_size, run.config.accumulate)
    return FileSource(run.loader, rows, run.steps)


def _from_rollouts(run: Parts) -> Source:
    return Rollouts(run.config, run.base, run.program, run.frozen, run.loader, run.workdir, run.ptx, run.between)


def _from_selected(run: Parts) -> Source:
    return Selected(run.config, run.base, run.program, run.frozen, run.loader, run.workdir, between=run.between)


def _from_both(run: Parts) -> Source:
    return Distilled(run.config, run.base, run.frozen, run.loader, run.workdir, run.between)


SOURCES: dict[str, Callable[[Parts], Source]] = {
    "files": _from_files,
    "rollouts": _from_rollouts,
    "pairs": _from_selected,
    "best": _from_selected,
    "distillation": _from_both,
}
