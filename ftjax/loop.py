"""The loop of every method: batch, step, metrics, evaluation, checkpoint; interrupted anywhere, resumed exactly."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.checkpoint import Checkpoints
from ftjax.errors import UserError
from ftjax.metrics import MetricsWriter
from ftjax.preemption import Preempted, Preemption
from ftjax.state import TrainState
from ftjax.tree import Tree

Step = Callable[[TrainState, Tree, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


class Progress(Protocol):
    """Where a person looks on (`ftjax.display`)."""

    def step(self, step: int, metrics: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass
class Loop:
    """What a run is made of besides its state; `run` is the loop itself.

    batch_at: index -> host batch [batch_size, length]; a pure function, so the data position is the step count.
    evaluate: (step, state) -> metrics with the prefix `eval_`, or None where there is nothing to evaluate.
    best_metric: the one of them that says which checkpoint is best.
    meta: JSON that every checkpoint carries (config, fingerprint of the data).
    """

    mesh: Mesh
    step: Step
    batch_at: Callable[[int], dict[str, np.ndarray]]
    epoch_at: Callable[[int], float]
    evaluate: Callable[[int, TrainState], dict[str, float]] | None
    best_metric: str | None
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    preemption: Preemption
    meta: dict[str, Any]
    total_steps: int
    accumulate: int
    log_every: int
    eval_every: int  # 0: only at the end
    evaluate_before: bool
    checkpoint_every: int


def run(
    loop: Loop, state: TrainState, frozen: Tree, saved: int | None, num_tokens: int, evaluated: bool
) -> TrainState:
    """Trains from `state.step` to `loop.total_steps`.

    saved: the step whose checkpoint `state` is, None for a fresh one; num_tokens: non-padding tokens seen before it;
    evaluated: whether its evaluation is already among the metrics.
    On SIGTERM the state is saved and Preempted raised. NaN or infinite loss or gradient raises UserError before
    anything of it is saved.
    """
    start = done = int(state.step)

    def save() -> None:
        nonlocal saved
        if saved != done:
            loop.checkpoints.save(done, state, loop.meta | {"num_tokens": num_tokens})
            saved = done

    timer = _Timer()
    try:
        while True:
            due = loop.evaluate is not None and _eval_due(loop, done) and not (evaluated and done == start)
            if due or done == loop.total_steps or (done and done % loop.checkpoint_every == 0):
                save()
            if due:
                metrics = loop.evaluate(done, state)
                # Recorded only beside a checkpoint that is whole: a restart then knows exactly what is left to do.
                loop.checkpoints.wait()
                loop.writer.write(done, metrics)
                if loop.best_metric in metrics:
                    loop.checkpoints.score(done, metrics[loop.best_metric])
                timer.restart()
            if done == loop.total_steps:
                return state
            loop.preemption.check()

            batch = loop.batch_at(done)
            num_tokens += (new_tokens := int(np.count_nonzero(batch["segment_ids"])))
            state, metrics = loop.step(state, frozen, place_batch(loop.mesh, batch, loop.accumulate))
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            done += 1
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]:
                raise UserError(
                    f"step {done}: {bad[0]} is {metrics[bad[0]]}. Nothing of this step is saved; lower "
                    "config.optimizer.learning_rate, raise config.schedule.warmup_ratio or look at the batch's data"
                )
            metrics |= timer.lap(new_tokens)
            loop.progress.step(done, metrics)
            if done % loop.log_every == 0 or done in (1, loop.total_steps):
                metrics |= {"epoch": loop.epoch_at(done), "num_tokens": num_tokens}
                metrics["packing_efficiency"] = new_tokens / batch["tokens"].size
                loop.writer.write(done, metrics)
    except Preempted:
        save()
        raise


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray], accumulate: int) -> dict[str, jax.Array]:
    """Host arrays [batch, length] -> global [accumulate, batch / accumulate, length], rows split over the mesh."""
    return {
        name: sharding.place(mesh, (None, "batch", "length"), array.reshape(accumulate, -1, *array.shape[1:]))
        for name, array in batch.items()
    }


def _eval_due(loop: Loop, step: int) -> bool:
    if step == 0:
        return loop.evaluate_before
    return step == loop.total_steps or bool(loop.eval_every and step % loop.eval_every == 0)


class _Timer:
    """Seconds and tokens per second of the last step; the first lap, which compiles, has none."""

    def __init__(self):
        self._last = None

    def restart(self) -> None:
        if self._last is not None:
            self._last = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float]:
        now, last = time.perf_counter(), self._last
        self._last = now
        if last is None:
            return {}
        return {"step_time": now - last, "tokens_per_second": tokens / (now - last)}
