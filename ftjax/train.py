"""python -m ftjax.train --config configs/X.py [--config.a.b=value ...] [--workdir DIR]

Fine-tunes a model as the config says. The same command again resumes where the last one stopped; a finished run is left
as it is. Exit status: 0 finished and saved, 2 a mistake in what was asked, 75 saved on SIGTERM (run it again to go on),
130 Ctrl-C (resumes from the last checkpoint).
"""

import sys
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from ftjax import assemble, cli, continued, describe, metrics, optim, sharding, tree
from ftjax import config as configs
from ftjax import workdir as workdirs
from ftjax.assemble import Base
from ftjax.checkpoint import Checkpoints
from ftjax.data import pipeline
from ftjax.data.loader import Loader
from ftjax.data.sources import TASK
from ftjax.display import Display
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator, best_metric, is_eval
from ftjax.loop import Loop, run
from ftjax.objectives.sft import make_sft
from ftjax.preemption import Preempted, Preemption
from ftjax.state import TrainState, abstract_state, init_state
from ftjax.step import make_step

OBJECTIVES = {"sft": make_sft}


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a run in `workdir`; returns the exit status of the command."""
    configs.validate(config)
    workdirs.probe(workdir)
    with (
        workdirs.lock(workdir),
        Preemption() as preemption,
        Display(config.log_every) as display,
        Checkpoints(workdir / "checkpoints", config.checkpoint.keep, best_metric(config)[1]) as checkpoints,
    ):
        try:
            return _train(config, workdir, preemption, display, checkpoints)
        except Preempted:
            checkpoints.close()
            display.say(f"SIGTERM: saved step {checkpoints.latest()}; the same command goes on from there")
            return cli.EXIT_PREEMPTED


def _train(
    config: ConfigDict, workdir: Path, preemption: Preemption, display: Display, checkpoints: Checkpoints
) -> int:
    mesh = sharding.make_mesh(dict(config.mesh))
    base = assemble.open_base(config.model)
    _check_length(config, base)
    train_loader, eval_loader, report = _load_data(config, base)
    total_steps = config.steps or train_loader.batches_in(config.epochs)
    meta = {"config": configs.as_json(config), "data": train_loader.fingerprint()}

    resumed = checkpoints.latest() if config.checkpoint.resume_step < 0 else config.checkpoint.resume_step
    if resumed is not None:
        _check_same_config(config, workdir)
    continued.pin(config, workdir, fresh=resumed is None)
    records = [] if resumed is None else metrics.read(workdir / "metrics.jsonl")
    recorded = {record["step"] for record in records if is_eval(record)}
    if resumed == total_steps and (total_steps in recorded or not config.data.eval):
        display.say(f"This run is finished: {total_steps} steps, saved in {workdir}. Nothing to do.")
        return 0

    with jax.set_mesh(mesh):
        abstract, is_trained = assemble.abstract_variables(config, base.model, mesh)
        trainable, _ = tree.partition(abstract, is_trained)
        schedule = optim.make_schedule(configs.learning_rate(config), config.schedule, total_steps)
        optimizer = optim.make_optimizer(config.optimizer, schedule)
        abstract_st = abstract_state(optimizer, trainable, mesh)
        objective = OBJECTIVES[config.objective.name](base.model)
        _check_batch(config, mesh)
        evaluator = Evaluator(config, base, mesh, objective, eval_loader, workdir, preemption, display)
        described = continued.effective(config, base.model.spec)
        display.table("ftjax.train", describe.run(described, base, mesh, abstract, is_trained, train_loader, report))

        display.say("reading the weights")
        variables = assemble.load_variables(config, base, abstract)
        trainable, frozen = tree.partition(variables, is_trained)
        num_tokens = 0
        if resumed is None:
            state = init_state(optimizer, trainable, abstract_st)
        else:
            _, state, saved_meta = checkpoints.restore(abstract_st, resumed)
            _check_same_data(train_loader, saved_meta, workdir)
            checkpoints.rewind(resumed)
            name, _ = best_metric(config)
            for record in records:
                if name in record and record["step"] <= resumed:
                    checkpoints.score(record["step"], record[name])
            num_tokens = saved_meta["num_tokens"]
            display.say(f"resuming after step {resumed}")
        del variables, trainable  # the step donates the state: no second copy may stay alive
        configs.write(config, workdir / "config.json")

        def evaluate(step: int, state: TrainState) -> dict[str, float]:
            return evaluator(step, state.trainable, frozen)

        writer = metrics.MetricsWriter(workdir, -1 if resumed is None else resumed)
        loop = Loop(
            mesh=mesh,
            step=make_step(objective, optimizer, schedule, abstract_st, config.seed),
            batch_at=train_loader.batch,
            epoch_at=train_loader.epoch_at,
            evaluate=evaluate if config.data.eval else None,
            best_metric=best_metric(config)[0],
            checkpoints=checkpoints,
            writer=writer,
            progress=display,
            preemption=preemption,
            meta=meta,
            total_steps=total_steps,
            accumulate=config.accumulate,
            log_every=config.log_every,
            eval_every=config.eval_every,
            evaluate_before=config.evaluate.before,
            checkpoint_every=config.checkpoint_every,
        )
        display.start_training(resumed or 0, total_steps)
        try:
            run(loop, state, frozen, resumed, num_tokens, evaluated=resumed in recorded)
        finally:
            writer.close()
    best = checkpoints.best()
    display.table("finished", describe.result(workdir, best))
    return 0


def _load_data(config: ConfigDict, base: Base) -> tuple[Loader, Loader | None, dict]:
    """The training rows, the held-out rows (None without any), and the report on the former."""
    data = config.data
    common = {
        "max_length": data.max_length,
        "packing": data.packing,
        "seed": config.seed,
        "max_bad_rows": data.max_bad_rows,
        "vocab_size": base.model.spec.vocab_size,
    }
    train_loader, report = pipeline.load(
        configs.sources(config, "train"), base.tokenizer, batch_size=data.batch_size, shuffle=True, **common
    )
    heldout = [entry for entry in configs.sources(config, "eval") if not entry["source"].startswith(TASK)]
    if not heldout:
        return train_loader, None, report
    micro_batch = data.batch_size // config.accumulate
    return (
        train_loader,
        pipeline.load(heldout, base.tokenizer, batch_size=micro_batch, shuffle=False, **common)[0],
        report,
    )


def _check_same_config(config: ConfigDict, workdir: Path) -> None:
    if changed := configs.changes(configs.read(workdir / "config.json"), config):
        raise UserError(
            f"{workdir} holds a run with another config; give these their old values or choose another --workdir:\n  "
            + "\n  ".join(changed)
        )


def _check_same_data(loader: Loader, saved: dict, workdir: Path) -> None:
    if saved["data"] != loader.fingerprint():
        raise UserError(
            f"{workdir}: the training data, its tokenizer or its chat template is not what this run began with; "
            "restore it or choose another --workdir"
        )


def _check_length(config: ConfigDict, base: Base) -> None:
    positions = base.model.spec.max_position_embeddings
    if config.data.max_length > positions:
        raise UserError(
            f"config.data.max_length={config.data.max_length} is more than the model's {positions} positions; lower it"
        )


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    rows, parts = config.data.batch_size // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} in {config.accumulate} micro-batch(es) is {rows} rows, "
            f"not a multiple of the mesh's data x fsdp = {parts}; set it to a multiple of {parts * config.accumulate}"
        )


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    config = cli.config_of(_CONFIG)
    workdir = Path(_WORKDIR.value or f"runs/{cli.config_name()}")
    return train(config, workdir)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.train"  # absl shows in --help the flags defined under this name
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="the run's config file, e.g. configs/quickstart.py")
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept (default: runs/NAME-OF-THE-CONFIG)")
    cli.run(main)
