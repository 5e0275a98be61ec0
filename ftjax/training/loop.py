"""The loop of every method: batch, step, metrics, evaluation, checkpoint; interrupted anywhere, resumed exactly."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.display import Display
from ftjax.training.metrics import MetricsWriter
from ftjax.training.preemption import Preempted, Preemption
from ftjax.training.source import Source
from ftjax.training.state import TrainState
from ftjax.tree import Tree

# (state, frozen, host arrays [rows, length]) -> (the next state, metrics)
Step = Callable[[TrainState, Tree, dict[str, np.ndarray]], tuple[TrainState, dict[str, jax.Array]]]


class Cadence(NamedTuple):
    """How many steps there are, and how many steps apart each event is."""

    total: int
    log: int
    checkpoint: int
    evaluate: int  # 0: only at the end
    evaluate_before: bool  # also before the first step, which is only recorded: nothing is saved there


class Records(NamedTuple):
    """Where a run is recorded."""

    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Display
    meta: dict[str, Any]  # JSON that every checkpoint carries (config, fingerprint of the data)
    judge: Callable[[int, dict[str, Any]], bool]  # takes note of an evaluation; whether the run ends with it
    seconds_per_token: float | None  # the FLOPs of one token / the peak of all devices together; None: unknown


@dataclass(frozen=True)
class Loop:
    """The parts of a run, apart from its state; `run` is the loop itself."""

    step: Step
    source: Source
    evaluate: Callable[[int, TrainState], dict[str, Any]] | None  # step and state -> metrics with the prefix `eval_`
    cadence: Cadence
    records: Records
    preemption: Preemption


class Start(NamedTuple):
    """Where a run begins or resumes."""

    state: TrainState
    frozen: Tree
    saved: int | None = None  # the step whose checkpoint `state` comes from; None for a new run
    num_tokens: int = 0  # seen before it, without padding
    evaluated: bool = False  # whether the metrics already hold its evaluation


def run(loop: Loop, start: Start) -> TrainState:
    """Trains from the step of `start` to the last one, or to an evaluation that is judged to be the last.

    When it is to stop before (see `Preemption`), the state is saved and Preempted raised. A NaN or infinite loss or
    gradient raises UserError before the step is saved. A save that fails ends the run at the next step.

    The devices never wait for the host: the metrics of a step are read after the next step has been started. Before a
    save, the metrics of all steps in it have been read.
    """
    cadence, records, source = loop.cadence, loop.records, loop.source
    state, saved, num_tokens = start.state, start.saved, start.num_tokens
    first = done = int(state.step)
    in_flight: deque[_InFlight] = deque()
    timer = _Timer()

    def drain(keep: int) -> None:
        """Checks and logs finished steps, the oldest first, until at most `keep` are in flight."""
        nonlocal num_tokens
        while len(in_flight) > keep:
            step = in_flight.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]:
                raise UserError(
                    f"step {step.number}: {bad[0]} is {metrics[bad[0]]}. Nothing of this step is saved; lower "
                    "config.optimizer.learning_rate, raise config.schedule.warmup_ratio or look at the batch's data"
                )
            num_tokens += step.tokens
            metrics |= {**step.batch_metrics, **timer.lap(step.tokens)}
            if records.seconds_per_token is not None and "tokens_per_second" in metrics:
                metrics["mfu"] = records.seconds_per_token * metrics["tokens_per_second"]
            records.progress.step(step.number, metrics)
            if step.number % cadence.log == 0 or step.number in (1, cadence.total):
                metrics |= {"epoch": source.epoch_at(step.number), "num_tokens": num_tokens}
                metrics["packing_efficiency"] = step.tokens / step.slots
                records.writer.write(step.number, metrics)

    def save() -> None:
        nonlocal saved
        drain(keep=0)
        if done not in (0, saved):  # before step 1 nothing has been made that the same command does not make again
            records.checkpoints.save(done, state, records.meta | {"num_tokens": num_tokens})
            saved = done
            timer.restart()

    def evaluate() -> bool:
        """Measures and records; whether the run ends with it."""
        metrics = loop.evaluate(done, state)
        # Recorded only when its checkpoint is complete, so that a restart knows what is left to do.
        records.checkpoints.wait()
        records.writer.write(done, metrics)
        timer.restart()
        return records.judge(done, metrics)

    with source:
        while True:
            at_end = done == cadence.total
            # Elsewhere the next batches come from an earlier state, which is gone: a run could not resume from there.
            if done % source.updates == 0 or at_end:
                since = range(max(first, done - source.updates) + 1, done + 1) or (done,)
                due = loop.evaluate is not None and any(_eval_due(cadence, step) for step in since)
                due = due and not (start.evaluated and done == first)
                if due or at_end or any(step and step % cadence.checkpoint == 0 for step in since):
                    save()
                if due:
                    at_end |= evaluate()
                if at_end:
                    return state
                try:
                    loop.preemption.check()
                except Preempted:
                    save()
                    raise

            asked = time.perf_counter()
            try:
                batch = source.batch(done, state)
            except Preempted:  # while the model wrote it: of that nothing is kept
                save()
                raise
            timer.waited += time.perf_counter() - asked
            state, metrics = loop.step(state, start.frozen, batch.arrays)
            done += 1
            in_flight.append(_InFlight(done, metrics, batch.metrics, batch.tokens, batch.arrays["tokens"].size))
            drain(keep=1)
            records.checkpoints.check()  # what is trained after a save that failed would be lost


class _InFlight(NamedTuple):
    """A step that the devices have started and may not have finished."""

    number: int
    metrics: dict[str, jax.Array]
    batch_metrics: Mapping[str, float]
    tokens: int  # of its batch, without padding
    slots: int  # of its batch, with padding


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray], accumulate: int) -> dict[str, jax.Array]:
    """Host arrays [batch, length] -> global [accumulate, batch / accumulate, length], rows split over the mesh."""
    return {
        name: sharding.place(mesh, (None, *sharding.batch_axes(name)), array.reshape(accumulate, -1, *array.shape[1:]))
        for name, array in batch.items()
    }


def _eval_due(cadence: Cadence, step: int) -> bool:
    if step == 0:
        return cadence.evaluate_before
    return step == cadence.total or bool(cadence.evaluate and step % cadence.evaluate == 0)


class _Timer:
    """Times laps, from the end of one step to the end of the next; not the first lap, which compiles."""

    def __init__(self):
        self._last = None
        self.waited = 0.0  # seconds of this lap spent waiting for a batch

    def restart(self) -> None:
        self.waited = 0.0
        if self._last is not None:
            self._last = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float]:
        """The metrics of the step that ends now, which had `tokens` tokens; {} for the first."""
        now, last, waited = time.perf_counter(), self._last, self.waited
        self._last, self.waited = now, 0.0
        if last is None:
            return {}
        step_time = now - last
        share = min(1.0, waited / step_time)
        return {"step_time": step_time, "tokens_per_second": tokens / step_time, "data_wait": share}
