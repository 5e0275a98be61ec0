"""The order of things in the loop: devices never wait for the host, and nothing unseen is saved."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.errors import TransientError, UserError
from ftjax.training.loop import Cadence, Loop, Records, Start, run
from ftjax.training.preemption import Preempted
from ftjax.training.source import Batch

PLACES = 2 * 3


class Recorder:
    """Stands for everything around the loop, and keeps what happened in order."""

    def __init__(self, total_steps, losses=(), checkpoint_every=100, preempt_before=None, evaluate_every=0):
        self.events, self.records, self.saved = [], {}, {}
        self._losses, self._preempt_before = dict(losses), preempt_before
        checkpoints = SimpleNamespace(wait=lambda: None, save=self._save, check=self._check_save)
        writer = SimpleNamespace(write=lambda step, metrics: self.records.update({step: metrics}))
        progress = SimpleNamespace(step=lambda step, metrics: self.events.append(f"seen {step}"))
        self.loop = Loop(
            step=self._step,
            source=self,
            evaluate=(lambda step, state: {"eval_loss": 0.5}) if evaluate_every else None,
            cadence=Cadence(total_steps, 1, checkpoint_every, evaluate_every, evaluate_before=False),
            records=Records(checkpoints, writer, progress, {}, self._judge, seconds_per_token=0.25),
            preemption=SimpleNamespace(check=self._check),
        )

    updates = 1
    last_evaluation = None
    failed_save = False

    def batch(self, index, state):
        assert state.step == index
        made = {"made": float(index)}
        return Batch(dict.fromkeys(("tokens", "segment_ids"), np.full((2, 3), index, np.int32)), index + 1, made)

    def epoch_at(self, step):
        return step / 2

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.events.append("closed")

    def run(self, start=0):
        state = run(self.loop, Start(SimpleNamespace(step=start), {}, start or None, 100))
        assert self.events.pop() == "closed"
        return state

    def _step(self, state, frozen, batch):
        step = state.step + 1
        assert int(batch["tokens"][0, 0]) == state.step  # its own batch
        self.events.append(f"started {step}")
        metrics = {"loss": self._losses.get(step, 1.0), "grad_norm": 1.0}
        return SimpleNamespace(step=step), {name: jnp.float32(value) for name, value in metrics.items()}

    def _save(self, step, state, meta):
        assert state.step == step
        self.events.append(f"saved {step}")
        self.saved[step] = meta

    def _judge(self, step, metrics):
        assert step in self.saved
        assert self.records[step] == metrics
        return step == self.last_evaluation

    def _check_save(self):
        if self.failed_save and self.saved:
            raise TransientError("saving failed")

    def _check(self):
        if self._preempt_before is not None and f"started {self._preempt_before - 1}" in self.events:
            raise Preempted


def test_a_step_is_started_before_the_one_before_it_is_looked_at():
    recorder = Recorder(4)
    assert recorder.run().step == 4
    order = ["started 1", "started 2", "seen 1", "started 3", "seen 2", "started 4", "seen 3", "seen 4", "saved 4"]
    assert recorder.events == order


def test_all_that_a_checkpoint_holds_has_been_looked_at_before():
    recorder = Recorder(5, checkpoint_every=2)
    recorder.run()
    for step in (2, 4, 5):
        at = recorder.events.index(f"saved {step}")
        assert {f"seen {one}" for one in range(1, step + 1)} <= set(recorder.events[:at])
        assert f"started {step + 1}" not in recorder.events[:at]
    assert recorder.saved[4]["num_tokens"] == 100 + 1 + 2 + 3 + 4


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 5])
def test_nothing_is_saved_at_or_after_a_step_that_is_not_finite(bad):
    recorder = Recorder(5, {bad: math.nan}, checkpoint_every=1)
    with pytest.raises(UserError, match=f"step {bad}: loss is nan"):
        recorder.run()
    assert list(recorder.saved) == list(range(1, bad))
    recorder = Recorder(5, {bad: math.inf}, checkpoint_every=3)
    with pytest.raises(UserError, match=f"step {bad}: loss is inf"):
        recorder.run()
    assert not [step for step in recorder.saved if step >= bad]
    assert len([event for event in recorder.events if event.startswith("started")]) <= bad + 1


def test_preempted_it_saves_what_it_has_looked_at():
    recorder = Recorder(9, preempt_before=4)
    with pytest.raises(Preempted):
        recorder.run()
    assert recorder.events[-3:] == ["seen 3", "saved 3", "closed"]
    recorder = Recorder(9, {3: math.nan}, preempt_before=4)
    with pytest.raises(UserError, match="step 3: loss is nan"):
        recorder.run()
    assert not recorder.saved


def test_a_save_that_fails_ends_the_run_at_the_next_step():
    recorder = Recorder(9, checkpoint_every=3)
    recorder.failed_save = True
    with pytest.raises(TransientError, match="saving failed"):
        recorder.run()
    assert recorder.events[-3:] == ["saved 3", "started 4", "closed"]


def test_before_the_first_step_nothing_is_saved():
    recorder = Recorder(9, preempt_before=1)
    recorder.events.append("started 0")
    with pytest.raises(Preempted):
        recorder.run()
    assert not recorder.saved


def test_what_is_logged():
    recorder = Recorder(4)
    recorder.run()
    assert list(recorder.records) == [1, 2, 3, 4]
    first, last = recorder.records[1], recorder.records[4]
    assert not {"step_time", "tokens_per_second", "data_wait", "mfu"} & first.keys()  # it compiled
    assert (last["num_tokens"], last["epoch"], last["packing_efficiency"]) == (110, 2.0, 4 / PLACES)
    assert last["tokens_per_second"] == pytest.approx(4 / last["step_time"])
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] / 4)
    assert 0 <= last["data_wait"] <= 1
    assert last["made"] == 3.0  # of the batch itself


def test_a_resumed_run_goes_on_with_the_next_batch():
    recorder = Recorder(4)
    recorder.run(start=2)
    assert recorder.events == ["started 3", "started 4", "seen 3", "seen 4", "saved 4"]


def test_saves_and_preemption_wait_for_the_bounds_of_a_source_that_makes_several_batches_of_one_state():
    recorder = Recorder(10, checkpoint_every=3)
    recorder.updates = 4
    recorder.run()
    assert list(recorder.saved) == [4, 8, 10]  # 3, 6 and 9 as soon as a new state is asked for, and the end
    recorder = Recorder(10, checkpoint_every=100, preempt_before=3)
    recorder.updates = 4
    with pytest.raises(Preempted):
        recorder.run()
    assert list(recorder.saved) == [4]


def test_an_evaluation_that_is_judged_to_be_the_last_ends_the_run_there():
    recorder = Recorder(9, evaluate_every=2)
    recorder.last_evaluation = 4
    assert recorder.run().step == 4
    assert list(recorder.saved) == [2, 4]
    assert list(recorder.records) == [1, 2, 3, 4]
    assert "started 5" not in recorder.events
