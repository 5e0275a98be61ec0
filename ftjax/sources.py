"""Where the batches of a run come from, by the name that its method gives (`method.Method.source`)."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from ftjax import sharding
from ftjax.assemble import Base, Program
from ftjax.data.batch.loader import Loader
from ftjax.distillation import Distilled
from ftjax.rollouts import Rollouts
from ftjax.selected import Selected
from ftjax.training.source import FileSource, Source
from ftjax.tree import Tree


class Parts(NamedTuple):
    """What a source may be made of.

    Attributes:
      loader: of the rows of data.train.
      steps: how many there are.
    """

    config: ConfigDict
    base: Base
    program: Program
    frozen: Tree
    loader: Loader
    workdir: Path
    steps: int


def _from_files(run: Parts) -> Source:
    rows = sharding.local_rows(run.program.mesh, run.config.data.batch_size, run.config.accumulate)
    return FileSource(run.loader, rows, run.steps)


def _from_rollouts(run: Parts) -> Source:
    return Rollouts(run.config, run.base, run.program, run.frozen, run.loader, run.workdir)


def _from_selected(run: Parts) -> Source:
    return Selected(run.config, run.base, run.program, run.frozen, run.loader, run.workdir)


def _from_both(run: Parts) -> Source:
    return Distilled(run.config, run.base, run.frozen, run.loader)


SOURCES: dict[str, Callable[[Parts], Source]] = {
    "files": _from_files,
    "rollouts": _from_rollouts,
    "pairs": _from_selected,
    "best": _from_selected,
    "distillation": _from_both,
}
