"""The loop of every method: batch, step, metrics, evaluation, checkpoint; interrupted anywhere, resumed exactly."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.data.batch.prefetch import Prefetched
from ftjax.errors import UserError
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.metrics import MetricsWriter
from ftjax.training.preemption import Preempted, Preemption
from ftjax.training.state import TrainState
from ftjax.tree import Tree

Step = Callable[[TrainState, Tree, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


class Progress(Protocol):
    """Where a person looks on (`ftjax.training.display`)."""

    def step(self, step: int, metrics: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass
class Loop:
    """What a run is made of besides its state; `run` is the loop itself.

    batch_at: index -> host batch [batch_size, length]; a pure function, so the data position is the step count. Only
      the rows that this process's devices hold need be filled (`sharding.local_rows`).
    tokens_at: index -> how many tokens that are not padding the whole batch has.
    evaluate: (step, state) -> metrics with the prefix `eval_`, or None where there is nothing to evaluate.
    best_metric: the one of them that says which checkpoint is best.
    token_share: the seconds that all devices together need for the FLOPs of one token at their peak; None: unknown.
    meta: JSON that every checkpoint carries (config, fingerprint of the data).
    """

    mesh: Mesh
    step: Step
    batch_at: Callable[[int], dict[str, np.ndarray]]
    tokens_at: Callable[[int], int]
    epoch_at: Callable[[int], float]
    evaluate: Callable[[int, TrainState], dict[str, float]] | None
    best_metric: str | None
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    preemption: Preemption
    token_share: float | None
    meta: dict[str, Any]
    total_steps: int
    accumulate: int
    log_every: int
    eval_every: int  # 0: only at the end
    evaluate_before: bool
    checkpoint_every: int


def run(loop: Loop, state: TrainState, frozen: Tree, saved: int | None, num_tokens: int, evaluated: bool) -> TrainState:
    """Trains from `state.step` to `loop.total_steps`.

    saved: the step whose checkpoint `state` is, None for a fresh one; num_tokens: non-padding tokens seen before it;
    evaluated: whether its evaluation is already among the metrics.
    On SIGTERM the state is saved and Preempted raised. NaN or infinite loss or gradient raises UserError before
    anything of it is saved.

    The devices have always the next step to do: a step's metrics are looked at when the one after it has been started,
    and the batch after that is made meanwhile. Before a save every step that it contains has been looked at.
    """
    start = done = int(state.step)
    started: deque[_Started] = deque()
    timer = _Timer()

    def look(leave: int) -> None:
        """Waits for the oldest of the started steps, checks and logs them, until so many are left."""
        nonlocal num_tokens
        while len(started) > leave:
            one = started.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(one.metrics).items()}
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]:
                raise UserError(
                    f"step {one.step}: {bad[0]} is {metrics[bad[0]]}. Nothing of this step is saved; lower "
                    "config.optimizer.learning_rate, raise config.schedule.warmup_ratio or look at the batch's data"
                )
            num_tokens += one.tokens
            metrics |= timer.lap(one.tokens)
            if loop.token_share is not None and "tokens_per_second" in metrics:
                metrics["mfu"] = loop.token_share * metrics["tokens_per_second"]
            loop.progress.step(one.step, metrics)
            if one.step % loop.log_every == 0 or one.step in (1, loop.total_steps):
                metrics |= {"epoch": loop.epoch_at(one.step), "num_tokens": num_tokens}
                metrics["packing_efficiency"] = one.tokens / one.places
                loop.writer.write(one.step, metrics)

    def save() -> None:
        nonlocal saved
        look(leave=0)
        if saved != done:
            loop.checkpoints.save(done, state, loop.meta | {"num_tokens": num_tokens})
            saved = done
            timer.restart()

    with Prefetched(lambda index: (loop.batch_at(index), loop.tokens_at(index)), stop=loop.total_steps) as batch_at:
        try:
            while True:
                due = loop.evaluate is not None and _eval_due(loop, done) and not (evaluated and done == start)
                if due or done == loop.total_steps or (done and done % loop.checkpoint_every == 0):
                    save()
                if due:
                    metrics = loop.evaluate(done, state)
                    # Recorded only beside a checkpoint that is whole: a restart then knows what is left to do.
                    loop.checkpoints.wait()
                    loop.writer.write(done, metrics)
                    if loop.best_metric in metrics:
                        loop.checkpoints.score(done, metrics[loop.best_metric])
                    timer.restart()
                if done == loop.total_steps:
                    return state
                loop.preemption.check()

                batch, tokens = batch_at(done)
                state, metrics = loop.step(state, frozen, place_batch(loop.mesh, batch, loop.accumulate))
                done += 1
                started.append(_Started(done, metrics, tokens, batch["tokens"].size))
                timer.waited += batch_at.waited
                look(leave=1)
        except Preempted:
            save()
            raise


class _Started(NamedTuple):
    """A step that the devices have been given, which may not be done."""

    step: int
    metrics: dict[str, jax.Array]
    tokens: int  # of its batch, without padding
    places: int  # of its batch, with padding


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
    """Times from one look at a step to the next; the first lap, which compiles, has none."""

    def __init__(self):
        self._last = None
        self.waited = 0.0  # seconds of this lap in which a batch was waited for

    def restart(self) -> None:
        self.waited = 0.0
        if self._last is not None:
            self._last = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float]:
        """tokens: of the step."""
        now, last, waited = time.perf_counter(), self._last, self.waited
        self._last, self.waited = now, 0.0
        if last is None:
            return {}
        step_time = now - last
        share = min(1.0, waited / step_time)
        return {"step_time": step_time, "tokens_per_second": tokens / step_time, "data_wait": share}
