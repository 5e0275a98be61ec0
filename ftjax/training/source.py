"""Where the batches of a run come from: files, or the model itself.

A source that lets the model write (rollouts) works on the loop's thread and under the mesh, with the state from before
the step, whose buffers the step will donate.
"""

import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ftjax.data.batch.loader import Loader
from ftjax.data.batch.prefetch import Prefetched
from ftjax.training.state import TrainState


class Batch(NamedTuple):
    """A global batch on the host."""

    arrays: dict[str, np.ndarray]  # [rows, length]; only the rows that this process's devices hold need be filled
    tokens: int  # of the whole batch, without padding
    metrics: Mapping[str, float] = types.MappingProxyType({})  # logged with those of the step


class Source(Protocol):
    """Batches by index, asked for in order from wherever a run (re)starts.

    Attributes:
      updates: how many consecutive batches are made from one state. Saves, evaluations and preemption happen only at
        steps that it divides, so that a resumed run makes the next batches from the same state.
    """

    updates: int

    def batch(self, index: int, state: TrainState) -> Batch:
        """Batch `index`, from 0: a function of it, a seed, and the `state` before the step that takes the batch.

        Preempted may be raised where `index` is a multiple of `updates`, so that the state can be saved.
        """

    def epoch_at(self, index: int) -> float:
        """How many epochs are done before batch `index`."""

    def __enter__(self) -> "Source": ...

    def __exit__(self, *error: object) -> None: ...


class FileSource:
    """The batches of a loader, made ahead, since they do not depend on the state.

    rows: those of a global batch that this process fills (`sharding.local_rows`).
    stop: the first index that is never asked for.
    """

    updates = 1

    def __init__(self, loader: Loader, rows: Sequence[int] | None, stop: int):
        self._loader, self._rows = loader, rows
        self._ahead = Prefetched(self._make, stop=stop)

    def _make(self, index: int) -> Batch:
        loader = self._loader
        metrics = {"shared_tokens": float(loader.shared_tokens(index))} if loader.shares else {}
        return Batch(loader.batch(index, self._rows), loader.batch_tokens(index), metrics)

    def batch(self, index: int, state: TrainState) -> Batch:
        return self._ahead(index)

    def epoch_at(self, index: int) -> float:
        return self._loader.epoch_at(index)

    def __enter__(self) -> "FileSource":
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(*error)
