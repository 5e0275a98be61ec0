"""Where the batches of a run come from: files, or the model itself.

The loop asks a source for batch after batch. One that reads files makes the next ones meanwhile, in a thread of its
own; one that lets the model write (rollouts) gets the state as it is before the step, on the loop's thread and under
the mesh, before the step donates its buffers.
"""

import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ftjax.data.batch.loader import Loader
from ftjax.data.batch.prefetch import Prefetched
from ftjax.training.state import TrainState


class Batch(NamedTuple):
    """
    Attributes:
      arrays: [rows, length] of the global batch; only the rows that this process's devices hold need be filled.
      tokens: how many tokens of the whole batch are not padding.
      metrics: of its making, logged beside those of the step.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    metrics: Mapping[str, float] = types.MappingProxyType({})


class Source(Protocol):
    """Batches by index, asked for in order from wherever a run (re)starts.

    Attributes:
      updates: how many batches in a row are made of one state. Saves, evaluations and preemption wait for their bounds
        (steps that it divides), so that a resumed run makes the next ones of the same state.
    """

    updates: int

    def batch(self, index: int, state: TrainState) -> Batch:
        """Batch `index`, from 0; `state` is that before the step which takes it. A function of both, and of a seed."""

    def epoch_at(self, index: int) -> float:
        """How many epochs are done before batch `index`."""

    def __enter__(self) -> "Source": ...

    def __exit__(self, *error: object) -> None: ...


class FileSource:
    """The batches of a loader, which no state changes: made ahead, up to `stop`, the first one that is never asked for.

    rows: those of a global batch that this process fills (`sharding.local_rows`).
    """

    updates = 1

    def __init__(self, loader: Loader, rows: Sequence[int] | None, stop: int):
        self._loader, self._rows = loader, rows
        self._ahead = Prefetched(self._make, stop=stop)

    def _make(self, index: int) -> Batch:
        return Batch(self._loader.batch(index, self._rows), self._loader.batch_tokens(index))

    def batch(self, index: int, state: TrainState) -> Batch:
        return self._ahead(index)

    def epoch_at(self, index: int) -> float:
        return self._loader.epoch_at(index)

    def __enter__(self) -> "FileSource":
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.__exit__(*error)
