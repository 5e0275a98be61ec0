"""A model fine-tuned as a config says.

    python -m ftjax.train --config chat --config.model.source=M --config.data.train=rows.jsonl
    python -m ftjax.train --config mine.yaml --config.epochs=3 --workdir runs/mine

--config is the name of a config that ships, or a file in Python, YAML or JSON, such as the config.json of another run;
--config.KEY=VALUE changes a key of it. The same command again resumes where the last one stopped; a finished run is
left as it is. Exit status: 0 finished and saved, 2 a mistake in what was asked, 75 saved on SIGTERM or at
config.max_hours (run it again to go on), 130 saved on Ctrl-C (a second Ctrl-C ends at once; then it resumes from the
last checkpoint).
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import (
    assemble,
    cached_reference,
    choices,
    cli,
    config_flag,
    describe,
    distillation,
    distributed,
    exportable,
    memory,
    origin,
    preflight,
    resume,
    rewards,
    rollouts,
    sharding,
)
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data import pipeline
from ftjax.data.batch.loader import Loader
from ftjax.data.tokens import templates
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.entries import split_entries
from ftjax.evals.evaluator import Evaluator
from ftjax.method import iterations, lasting
from ftjax.planning import flops
from ftjax.reporting import page
from ftjax.sources import SOURCES, Parts, fingerprint, ptx_loader
from ftjax.training import curves, environment, metrics, trackers
from ftjax.training import workdir as workdirs
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.display import Display
from ftjax.training.loop import Cadence, Loop, Records, place_batch, run
from ftjax.training.preemption import CTRL_C, SIGTERM, Preempted, Preemption
from ftjax.training.state import TrainState
from ftjax.training.step import compiling
from ftjax.tree import Tree
from ftjax.weights.peft import continued


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a run in `workdir`; returns the exit status of the command."""
    began = time.time()
    configs.validate(config)
    preflight.check_evaluation(config)
    if distributed.is_first():
        trackers.check(config.trackers)
    decides = best.decides(config)
    mode = decides.mode if decides else "min"
    with (
        workdirs.hold(workdir),
        Preemption(config.max_hours) as preemption,
        Display(config.log_every, quiet=not distributed.is_first()) as display,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep, mode) as checkpoints,
    ):
        return _train(config, workdir, began, preemption, display, checkpoints)


def _train(
    config: ConfigDict,
    workdir: Path,
    began: float,
    preemption: Preemption,
    display: Display,
    checkpoints: Checkpoints,
) -> int:
    # Mesh, and what is there already.
    mesh = sharding.make_mesh(dict(config.mesh))
    distributed.check()
    room, given = memory.of_device(mesh), config
    config, there = resume.find(given, mesh, workdir, checkpoints)
    room = room and room - rewards.needed(config)

    # Config and model: described, not read yet.
    asked = config
    config = choices.by_devices(config, sharding.platform(mesh), mesh.size)
    base, teacher, contents = _open_base(config, workdir, there)
    preflight.check_adapter_tokenizer(config, base, display)
    preflight.check_length(config, base.model.spec)
    preflight.check_mesh(config, base.model.spec, mesh)
    preflight.check_sharing(config, base.model.spec, mesh)

    # Data.
    config, train_loader, heldout, report = _load_data(config, base, teacher, mesh, room, display)
    ptx = ptx_loader(config, base, mesh, display.counter)
    base = base._replace(model=base.model.clone(remat=config.model.remat))
    preflight.check_whole_step(config)
    rows_digest = fingerprint(train_loader, ptx)
    preflight.check_same_everywhere(given, contents, rows_digest, heldout)
    total_steps = resume.steps_of(config, train_loader)
    preflight.check_steps(config, there.step, total_steps)
    early = there.ended_early(config)
    if early or there.finished(config, total_steps):
        resume.check_data(checkpoints.meta(there.step), workdir, rows_digest)
        on = f" It ended early: {early}; to go on, raise config.evaluate.patience, or set it to 0." if early else ""
        display.say(f"This run is finished: {there.step} steps, saved in {workdir}. Nothing to do.{on}")
        return 0
    preflight.check_partners(train_loader, total_steps)
    preflight.check_balance(config, train_loader, display)
    preflight.check_rows(config, base, train_loader, heldout, display)
    if ptx is not None:
        preflight.check_rows(config, base, ptx, heldout, display, kind="conversation")
    preflight.check_classes(config, train_loader, display)
    rollouts.check(config, base.model.spec, base.tokenizer, train_loader)
    distillation.check(config, train_loader)

    with jax.set_mesh(mesh):
        # Shardings, objective, optimizer and step: shapes only.
        program = assemble.program(config, base.model, mesh, total_steps, teacher and teacher.model)
        preflight.check_ranks(program.variables.get("lora", {}), display)
        lasts = lasting(program.method, program.variables)
        exportable.check(tuple(config.export_formats), config, base, lasts)
        evaluator = Evaluator(config, base, program, heldout, workdir, preemption, display)
        described = continued.effective(config, base.model.spec)
        about = describe.run(described, asked, base, room, program, train_loader, report)
        display.table("ftjax.train", about)
        rows, examples = train_loader.rows_per_epoch(0), train_loader.examples.count
        if few := choices.few_updates(config, asked, base.model.spec, mesh, rows, examples, total_steps):
            display.say(f"warning: {few}, and more rows help most")

        # Weights, adapters, state. Reading takes as long as compiling, and neither needs the other. But batches may be
        # of several lengths, and those with images, or of what the model is to write, of any.
        is_known = tuple(train_loader.lengths) == (program.row_length,)
        is_known &= not (program.method.rollouts or config.model.vision)
        shapes = (program.state, program.frozen, program.batch)
        wait_for_step = compiling(program.step, mesh, *shapes) if is_known else lambda: None
        display.say("reading the weights")
        smaller = memory.smaller(config, mesh)

        def begin(variables: Tree) -> None:
            evaluator.begin(variables)
            if config.objective.cache_reference:
                for loader in filter(None, (train_loader, heldout)):
                    cached_reference.add(config, contents, program, variables, loader, display, preemption)

        try:
            with memory.exhausted("reading the weights", smaller):
                start = resume.start(there, config, base, program, workdir, checkpoints, rows_digest, begin)
                start = start._replace(frozen=distillation.with_teacher(start.frozen, config, teacher, program))
        except Preempted as stop:
            return _stopped(stop, there.step, checkpoints, display)
        distributed.meet_devices()
        if there.step is not None:
            display.say(f"resuming after step {there.step}")
            if taken_over := resume.extended(given, config, workdir):
                display.say(taken_over)
            if (planned := resume.steps_of(there.config, train_loader)) != total_steps:
                display.say(resume.going_on(config, there.step, planned, total_steps))
        located = origin.located(config, base.path)
        if there.step is not None and (warning := resume.other_evaluation(there.config, located)):
            display.say(warning)
        if distributed.is_first():
            origin.record(workdir, given, located, contents, fresh=there.step is None)
            counts = report | ({"heldout_examples": len(heldout.examples)} if heldout else {})
            environment.begin(workdir, mesh, began, there.step, total_steps, about, counts)
            configs.write(located, workdir / "config.json")
            if there.step is None:
                templates.keep(config.data.chat_template, base.tokenizer, workdir)

        @functools.cache
        def ready() -> None:  # for the first step, after which no more memory is needed
            wait_for_step()
            cli.give_back_memory()

        def step(state: TrainState, frozen: Tree, arrays: dict) -> tuple:
            ready()
            return program.step(state, frozen, place_batch(mesh, arrays, config.accumulate))

        evaluated, digest = there.reached(), evaluator.digest()
        for record in evaluated:
            if record.get(best.SET) == digest:  # what is measured is known before it is measured again
                best.decides(config).check(record)

        def evaluate(number: int, state: TrainState) -> dict[str, Any]:
            fewer = f"--config.evaluate.batch_size={max(config.evaluate.batch_size // 2, 1)} (prompts at a time)"
            with memory.exhausted("evaluating", [fewer, *smaller]):
                measured = evaluator(number, state.result, start.frozen | state.collections)
            best.decides(config).check(measured)
            return measured | {best.SET: digest}

        def judge(number: int, measured: dict[str, Any]) -> bool:
            """Says which checkpoint is the best now, and whether the run ends."""
            evaluated.append({"step": number} | measured)
            checkpoints.rate(best.scores(config, evaluated))
            if early := best.stalled(config, evaluated):
                display.say(f"step {number}: the run ends early, with {early}")
            return bool(early)

        # Loop, checkpoints.
        after, plain = -1 if there.step is None else there.step, configs.flat(ConfigDict(configs.as_json(located)))
        writer, finished = metrics.MetricsWriter(workdir, after, config.trackers, plain), False
        meta = {"config": configs.as_json(located), "data": rows_digest}
        seconds = flops.seconds_per_token(program)
        between = functools.partial(preemption.check, within=True)
        parts = Parts(config, base, program, start.frozen, train_loader, ptx, workdir, total_steps, between)
        loop = Loop(
            step,
            SOURCES[program.method.source](parts),
            evaluate if configs.evaluates(config) else None,
            cadence(config, train_loader, total_steps),
            Records(checkpoints, writer, display, meta, judge, seconds),
            preemption,
        )
        display.start_training(there.step or 0, total_steps)
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state))
        preemption.reserve = lambda: checkpoints.save_seconds(state_bytes)
        preemption.defer_interrupts()
        try:
            with memory.exhausted("training", smaller):
                run(loop, start)
            finished = True
        except Preempted as stop:
            return _stopped(stop, there.step, checkpoints, display)
        finally:
            writer.close(finished)
            environment.end(workdir)
    standing = best.Standing.of(config, workdir, checkpoints.steps())
    display.draw(curves.draw(metrics.read(workdir / "metrics.jsonl"), standing.scores, standing.metric))
    taken_as = exportable.smallest(config, base, lasts)
    display.table("finished", describe.result(workdir, standing, program.method, taken_as) | _report(workdir, display))
    return 0


def _report(workdir: Path, display: Display) -> dict[str, str]:
    """Writes the page about the run; the row that names it. The run is saved, whether that works or not."""
    file = workdir / page.FILE
    if not distributed.is_first():
        return {}
    try:
        page.write([workdir], file)
    except (OSError, UserError) as error:
        display.say(f"warning: {file} is not written: {error}. python -m ftjax.report {workdir} tries again")
        return {}
    return {"report": str(file)}


def cadence(config: ConfigDict, loader: Loader, total_steps: int) -> Cadence:
    """How often what happens, in steps."""
    evaluate = loader.batches_in(config.eval_epochs) * iterations(config) if config.eval_epochs else config.eval_every
    return Cadence(total_steps, config.log_every, config.checkpoint_every, evaluate, config.evaluate.before)


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


def _open_base(config: ConfigDict, workdir: Path, there: resume.Resume) -> tuple[Base, Base | None, dict[str, str]]:
    """The base, the teacher if there is one, and the digests of what they and those who reward consist of: of a run
    that goes on they are those that it began with."""
    if there.step is None:
        preflight.check_used(config)
    with_kept = config
    if there.step is not None:
        with_kept = configs.changed(config, {"data.chat_template": templates.kept(config.data.chat_template, workdir)})
    base = assemble.open_base(config.model, with_kept.data)
    teacher = distillation.open_teacher(config, base)
    contents = origin.contents(config, base.reader, base.model.spec)
    contents |= {"teacher": distillation.teacher_digest(config, teacher)} if teacher else {}
    contents |= rewards.digests(config)
    if there.step is not None:
        origin.check(config, workdir, contents)
    return base, teacher, contents


def _load_data(
    config: ConfigDict, base: Base, teacher: Base | None, mesh: Mesh, room: float | None, display: Display
) -> tuple[ConfigDict, Loader, Loader | None, dict]:
    """The config with all that it left open chosen, the training rows, the held-out rows (None without any), and the
    report on the former. room: bytes of a device's memory.
    """
    model, train, (_, heldout) = base.model, configs.sources(config, "train"), split_entries(config)
    spec = assemble.data_spec(config, model.spec, mesh, base.images)
    examples = pipeline.read(train, base.tokenizer, spec, display.counter)
    sizes, prefix = pipeline.sizes(examples, spec)
    config = choices.by_model(config, model.spec)
    config = choices.by_data(config, model.spec, mesh, sizes, examples.count, prefix)
    config = choices.by_memory(config, model, mesh, room, teacher and teacher.model)
    spec = assemble.data_spec(config, model.spec, mesh, base.images)
    loader = pipeline.training_loader(examples, spec)
    spec = dataclasses.replace(spec, batch_size=spec.batch_size // config.accumulate)
    return config, loader, pipeline.load_heldout(heldout, train, base.tokenizer, spec, display.counter), examples.report


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    config = config_flag.value()
    workdir = Path(_WORKDIR.value or f"runs/{config_flag.name()}")
    with distributed.connected(flags.FLAGS):
        return train(config, workdir)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.train"  # absl shows in --help the flags defined under this name
    config_flag.define()
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept (default: runs/NAME-OF-THE-CONFIG)")
    distributed.define_flags()
    cli.run(main, config_flag.parse)
