"""python -m ftjax.train --config configs/X.py [--config.a.b=value ...] [--workdir DIR]

Fine-tunes a model as the config says. The same command again resumes where the last one stopped; a finished run is left
as it is. Exit status: 0 finished and saved, 2 a mistake in what was asked, 75 saved on SIGTERM or at config.max_hours
(run it again to go on), 130 saved on Ctrl-C (a second Ctrl-C ends at once; then it resumes from the last checkpoint).
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from ftjax import assemble, cli, describe, distributed, preflight, resume, sharding
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data import pipeline
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import TASK
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.evaluator import Evaluator, best_metric
from ftjax.planning import flops
from ftjax.training import metrics
from ftjax.training import workdir as workdirs
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.display import Display
from ftjax.training.loop import Cadence, Loop, Records, place_batch, run
from ftjax.training.preemption import CTRL_C, SIGTERM, Preempted, Preemption
from ftjax.training.state import TrainState
from ftjax.tree import Tree
from ftjax.weights.peft import continued


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a run in `workdir`; returns the exit status of the command."""
    configs.validate(config)
    with (
        workdirs.hold(workdir),
        Preemption(config.max_hours) as preemption,
        Display(config.log_every, quiet=not distributed.is_first()) as display,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep, best_metric(config)[1]) as checkpoints,
    ):
        return _train(config, workdir, preemption, display, checkpoints)


def _train(
    config: ConfigDict, workdir: Path, preemption: Preemption, display: Display, checkpoints: Checkpoints
) -> int:
    # Config, mesh, model: described, not read yet.
    mesh = sharding.make_mesh(dict(config.mesh))
    distributed.check()
    base = assemble.open_base(config.model)
    preflight.check_length(config, base.model.spec)
    preflight.check_mesh(config, base.model.spec, mesh)

    # Data.
    train_loader, heldout, report = _load_data(config, base, mesh, display)

    def steps_of(config: ConfigDict) -> int:
        return config.steps or train_loader.batches_in(config.epochs)

    total_steps = steps_of(config)
    preflight.check_same_everywhere(config, base, train_loader, heldout)

    # What is there already.
    there = resume.find(config, workdir, checkpoints, steps_of)
    if there.finished(config, total_steps):
        display.say(f"This run is finished: {total_steps} steps, saved in {workdir}. Nothing to do.")
        return 0
    preflight.check_rows(config, base, train_loader, heldout, display)

    with jax.set_mesh(mesh):
        # Shardings, objective, optimizer and step: shapes only.
        program = assemble.program(config, base.model, mesh, total_steps)
        evaluator = Evaluator(config, base, mesh, program.objective, heldout, workdir, preemption, display)
        described = continued.effective(config, base.model.spec)
        display.table("ftjax.train", describe.run(described, base, mesh, program, train_loader, report))

        # Weights, adapters, state.
        display.say("reading the weights")
        start = resume.start(there, config, base, program, workdir, checkpoints, train_loader.fingerprint())
        distributed.meet_devices()
        if there.step is not None:
            display.say(f"resuming after step {there.step}")
            if there.planned != total_steps:
                display.say(resume.going_on(config, there, total_steps))
        if distributed.is_first():
            configs.write(config, workdir / "config.json")

        def step(state: TrainState, frozen: Tree, arrays: dict) -> tuple:
            return program.step(state, frozen, place_batch(mesh, arrays, config.accumulate))

        def evaluate(number: int, state: TrainState) -> dict[str, float]:
            return evaluator(number, state.trainable, start.frozen | ({"kept": state.kept} if state.kept else {}))

        # Loop, checkpoints.
        writer = metrics.MetricsWriter(workdir, -1 if there.step is None else there.step)
        rows = sharding.local_rows(mesh, config.data.batch_size, config.accumulate)
        meta = {"config": configs.as_json(config), "data": train_loader.fingerprint()}
        seconds = flops.seconds_per_token(program)
        loop = Loop(
            step,
            program.method.source(program, start.frozen, train_loader, rows, total_steps),
            evaluate if configs.evaluates(config) else None,
            Cadence(total_steps, config.log_every, config.checkpoint_every, config.eval_every, config.evaluate.before),
            Records(checkpoints, writer, display, meta, best_metric(config)[0], seconds),
            preemption,
        )
        display.start_training(there.step or 0, total_steps)
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state))
        preemption.reserve = lambda: checkpoints.save_seconds(state_bytes)
        preemption.defer_interrupts()
        try:
            run(loop, start)
        except Preempted as stop:
            return _stopped(stop, there.step, checkpoints, display)
        finally:
            writer.close()
    display.table("finished", describe.result(workdir, best.Standing.of(config, workdir, checkpoints.steps())))
    return 0


def _stopped(stop: Preempted, began: int | None, checkpoints: Checkpoints, display: Display) -> int:
    """Says what is saved of a run that was stopped before its end, begun at a step; returns the exit status."""
    checkpoints.close()
    # Where several processes were told to stop, not all of them were told why.
    reasons = json.loads(distributed.tell(json.dumps(distributed.collect(str(stop)))))
    reason = next((reason for reason in reasons if reason != SIGTERM), SIGTERM)
    step = checkpoints.latest()
    if reason not in (SIGTERM, CTRL_C) and step == began:
        raise UserError(f"{reason}: the time is over before a step was trained and saved; raise it")
    saved = "nothing is trained yet; the same command begins again"
    if step is not None:
        saved = f"saved step {step}; the same command goes on from there"
    display.say(f"{reason}: {saved}")
    return cli.EXIT_INTERRUPTED if reason == CTRL_C else cli.EXIT_PREEMPTED


def _load_data(config: ConfigDict, base: Base, mesh: Mesh, display: Display) -> tuple[Loader, Loader | None, dict]:
    """The training rows, the held-out rows (None without any), and the report on the former."""
    spec = assemble.data_spec(config, base.model.spec, mesh)
    train, heldout = configs.sources(config, "train"), configs.sources(config, "eval")
    loader, report = pipeline.load(train, base.tokenizer, spec, display.counter)
    rows = [entry for entry in heldout if not entry["source"].startswith(TASK)]
    spec = dataclasses.replace(spec, batch_size=spec.batch_size // config.accumulate)
    return loader, pipeline.load_heldout(rows, train, base.tokenizer, spec, display.counter), report


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    config = cli.config_of(_CONFIG)
    workdir = Path(_WORKDIR.value or f"runs/{cli.config_name()}")
    with distributed.connected(flags.FLAGS):
        return train(config, workdir)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.train"  # absl shows in --help the flags defined under this name
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="the run's config file, e.g. configs/quickstart.py")
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept (default: runs/NAME-OF-THE-CONFIG)")
    distributed.define_flags()
    cli.run(main)
