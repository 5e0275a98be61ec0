"""Killed with -9 at any moment, a run's directory lists only whole steps (cases 1, 2 and 3)."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ftjax.training.checkpoint import Checkpoints

SIZE = 250_000  # of each of two arrays: 2 MB


def values(step: int) -> dict[str, np.ndarray]:
    """The state at a step: incompressible, and different everywhere from every other step's."""
    rng = np.random.default_rng(step)
    return {"w": rng.standard_normal(SIZE, np.float32), "n": rng.integers(-(2**31), 2**31 - 1, SIZE, np.int32)}


def like():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for k, x in values(0).items()}


def train(directory: Path, events) -> None:
    """Resume, then save every step without end: most of the time goes to saving, committing and removing."""
    with Checkpoints(directory, keep=2) as checkpoints:
        step = checkpoints.latest() or 0
        if step:
            assert checkpoints.restore(like())[2]["step"] == step
        events.send(step)
        scores = {}
        while True:
            step += 1
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, values(step)), {"step": step})
            # The best is one of every seven, so that steps in the middle are removed, too.
            scores[step] = step % 7 - step // 7
            checkpoints.rate(scores)
            events.send(step)


def kill_and_check(directory: Path, kills: int, seed: int) -> None:
    # A server that has the imports done forks each run in milliseconds; it never starts a JAX backend itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftjax.training.checkpoint", __name__])
    rng = random.Random(seed)
    left = set()
    last = 0
    for kill in range(kills):
        events, child_end = context.Pipe(duplex=False)
        run = context.Process(target=train, args=(directory, child_end), daemon=True)
        run.start()
        child_end.close()
        assert events.poll(60)
        assert events.recv() == last  # the run resumed from what the check below found
        committed = last
        for _ in range(rng.randint(0, 2)):
            assert events.poll(60)
            committed = events.recv()
        if kill % 2:
            run.join(rng.uniform(0, 0.15))  # a save takes about that long: any moment of it
        else:  # within a save, on a busy machine too
            until = time.monotonic() + 60
            while time.monotonic() < until and not list(directory.glob("writing-*")):
                time.sleep(0.001)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        assert run.exitcode == -signal.SIGKILL
        while events.poll():  # saves that were reported before the kill
            try:
                committed = events.recv()
            except EOFError:
                break
        left |= {path.name.rstrip("0123456789") for path in directory.iterdir()}

        with Checkpoints(directory, keep=2) as checkpoints:
            assert all(path.name.isdecimal() for path in directory.iterdir())  # leftovers are gone
            steps = checkpoints.steps()
            for step in steps:
                found, state, meta = checkpoints.restore(like(), step)
                assert (found, meta["step"]) == (step, step)
                for name, value in values(step).items():
                    np.testing.assert_array_equal(np.asarray(state[name]), value, strict=True)
            last = checkpoints.latest() or 0
            assert last == max(steps, default=0)
        # What was reported as saved is there; at most the one in the making is lost or has just made it.
        assert last in (committed, committed + 1)
    print(json.dumps({"kills": kills, "steps": last, "leftovers": sorted(left)}))
    assert last > 5
    assert any(name.startswith("writing-") for name in left)  # some kills did hit a save


def test_killed_while_saving(tmp_path):
    kill_and_check(tmp_path, kills=8, seed=0)


@pytest.mark.slow
def test_killed_while_saving_many_times(tmp_path):
    kill_and_check(tmp_path, kills=200, seed=1)
