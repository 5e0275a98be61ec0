"""python -m ftjax.train --config configs/X.py [--config.a.b=value ...] [--workdir DIR]

Fine-tunes a model as the config says. The same command again resumes where the last one stopped; a finished run is left
as it is. Exit status: 0 finished and saved, 2 a mistake in what was asked, 75 saved on SIGTERM (run it again to go on),
130 Ctrl-C (resumes from the last checkpoint).
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from ftjax import assemble, cli, describe, distributed, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data import pipeline
from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import TASK, read_sources
from ftjax.errors import UserError
from ftjax.evals.evaluator import Evaluator, best_metric, is_eval
from ftjax.objectives.registry import OBJECTIVES
from ftjax.planning import flops
from ftjax.planning.chips import CHIPS
from ftjax.training import metrics, optim
from ftjax.training import workdir as workdirs
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.display import Display
from ftjax.training.loop import Loop, run
from ftjax.training.preemption import Preempted, Preemption
from ftjax.training.state import TrainState, abstract_state, init_state
from ftjax.training.step import make_step
from ftjax.tree import Tree
from ftjax.weights.peft import continued


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a run in `workdir`; returns the exit status of the command."""
    configs.validate(config)
    with (
        workdirs.hold(workdir),
        Preemption() as preemption,
        Display(config.log_every, quiet=not distributed.is_first()) as display,
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
    distributed.check()
    base = assemble.open_base(config.model)
    _check_length(config, base)
    train_loader, eval_loader, report = _load_data(config, base, mesh, display)
    total_steps = config.steps or train_loader.batches_in(config.epochs)
    meta = {"config": configs.as_json(config), "data": train_loader.fingerprint()}
    _check_same_everywhere(config, base, train_loader, eval_loader)

    resumed = checkpoints.latest() if config.checkpoint.resume_step < 0 else config.checkpoint.resume_step
    if resumed is not None:
        _check_same_config(config, workdir)
    if distributed.is_first() or resumed is not None:
        continued.pin(config, workdir, fresh=resumed is None)
    records = [] if resumed is None else metrics.read(workdir / "metrics.jsonl")
    # What the first process reads decides: another host may still see an older file.
    recorded = set(json.loads(distributed.tell(json.dumps([one["step"] for one in records if is_eval(one)]))))
    if resumed == total_steps and (total_steps in recorded or not configs.evaluates(config)):
        display.say(f"This run is finished: {total_steps} steps, saved in {workdir}. Nothing to do.")
        return 0
    _check_data(config, base, train_loader, eval_loader, display)

    with jax.set_mesh(mesh):
        abstract, is_trained = assemble.abstract_variables(config, base.model, mesh)
        trainable, _ = tree.partition(abstract, is_trained)
        schedule = optim.make_schedule(configs.learning_rate(config), config.schedule, total_steps)
        optimizer = optim.make_optimizer(config.optimizer, schedule)
        abstract_st = abstract_state(optimizer, trainable, mesh)
        objective = OBJECTIVES[config.objective.name](base.model)
        _check_mesh(config, base, mesh)
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
        if distributed.is_first():
            configs.write(config, workdir / "config.json")

        def evaluate(step: int, state: TrainState) -> dict[str, float]:
            return evaluator(step, state.trainable, frozen)

        rows = sharding.local_rows(mesh, config.data.batch_size, config.accumulate)
        writer = metrics.MetricsWriter(workdir, -1 if resumed is None else resumed)
        loop = Loop(
            mesh=mesh,
            step=make_step(objective, optimizer, schedule, abstract_st, config.seed, base.model.dtype),
            batch_at=functools.partial(train_loader.batch, rows=rows),
            tokens_at=train_loader.batch_tokens,
            epoch_at=train_loader.epoch_at,
            evaluate=evaluate if configs.evaluates(config) else None,
            best_metric=best_metric(config)[0],
            checkpoints=checkpoints,
            writer=writer,
            progress=display,
            preemption=preemption,
            token_share=_token_share(config, base, abstract, is_trained, mesh),
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


def _load_data(config: ConfigDict, base: Base, mesh: Mesh, display: Display) -> tuple[Loader, Loader | None, dict]:
    """The training rows, the held-out rows (None without any), and the report on the former."""
    data = config.data
    train, heldout = configs.sources(config, "train"), configs.sources(config, "eval")
    heldout = [entry for entry in heldout if not entry["source"].startswith(TASK)]
    common = {
        "max_length": data.max_length,
        "packing": data.packing,
        "seed": config.seed,
        "max_bad_rows": data.max_bad_rows,
        "vocab_size": base.model.spec.vocab_size,
        "train_on": data.train_on,
        "holdout": data.holdout,
        # Where rows are split, each part has the length that the attention kernels want.
        "multiple": 128 * mesh.shape["context"] if mesh.shape["context"] > 1 else 1,
        "counter": display.counter,
    }
    train_loader, report = pipeline.load(train, base.tokenizer, batch_size=data.batch_size, shuffle=True, **common)
    if not heldout and not data.holdout:
        return train_loader, None, report
    eval_loader, _ = pipeline.load(
        heldout,
        base.tokenizer,
        batch_size=data.batch_size // config.accumulate,
        shuffle=False,
        heldout_of=train if data.holdout else (),
        max_dropped=1.0,  # one long row would be more than the usual share of a small set
        **common,
    )
    return train_loader, eval_loader, report


def _check_data(
    config: ConfigDict, base: Base, train_loader: Loader, eval_loader: Loader | None, display: Display
) -> None:
    """Says what the checks of the rows find; errors end the run here, unless config.data.checks is "warn" or "off"."""
    if config.data.checks == "off":
        return
    tasks = [entry for entry in configs.sources(config, "eval") if entry["source"].startswith(TASK)]
    heldout = [read_sources([{"split": "test", **entry} for entry in tasks])] if tasks else []
    if eval_loader is not None:
        heldout.append(checks.RowsOf(eval_loader.examples))
    facts = checks.TokenFacts.of(base.tokenizer, base.end_tokens, config.data.max_length)
    found = checks.at_start(train_loader.examples, heldout, facts)
    errors = [str(finding) for finding in found if finding.severity == ERROR]
    stops = bool(errors) and config.data.checks == "on"
    for finding in found:
        if finding.severity != ERROR or not stops:
            display.say(str(finding))
    if stops:
        raise UserError(
            "\n  ".join(["the rows have errors", *errors])
            + "\npython -m ftjax.inspect_data with the same --config shows them; config.data.checks=warn starts anyway"
        )


def _token_share(
    config: ConfigDict, base: Base, abstract: Tree, is_trained: Callable[[str], bool], mesh: Mesh
) -> float | None:
    """The seconds that the mesh needs for the FLOPs of one token at its peak; None for devices of unknown peak."""
    kind = mesh.devices.flat[0].device_kind
    peaks = [chip.flops for chip in CHIPS.values() if chip.devices == kind]
    if not peaks:
        return None
    length = config.data.max_length
    return flops.count(base.model.spec, abstract, is_trained, 1, length).total / length / (peaks[0] * mesh.size)


def _check_same_config(config: ConfigDict, workdir: Path) -> None:
    if changed := configs.changes(configs.read(workdir / "config.json"), config):
        raise UserError(
            f"{workdir} holds a run with another config; give these their old values or choose another --workdir:\n  "
            + "\n  ".join(changed)
        )


def _check_same_everywhere(config: ConfigDict, base: Base, train_loader: Loader, eval_loader: Loader | None) -> None:
    """UserError where this process was not started as the first one was, or reads other files."""
    if distributed.count() == 1:
        return
    ours = configs.flat(ConfigDict(configs.as_json(config)))
    facts = {
        "training data, or tokenizer": train_loader.fingerprint(),
        "evaluation data": eval_loader and eval_loader.fingerprint(),
        "model weights (config.model.source)": assemble.base_facts(config, base).digest,
        "adapter (config.adapter.source)": continued.digest(config),
    }
    theirs, others = json.loads(distributed.tell(json.dumps([ours, facts]), limit=distributed.LOADING_SECONDS))
    if other := [f"{key}: {ours[key]!r}, there {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]:
        raise UserError(
            f"process {distributed.index()} was started with another config than process 0:\n  " + "\n  ".join(other)
        )
    if other := [name for name in facts if facts[name] != others[name]]:
        raise UserError(
            f"process {distributed.index()} has other {', '.join(other)} than process 0; give every host the same files"
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


def _check_mesh(config: ConfigDict, base: Base, mesh: Mesh) -> None:
    """That rows, their length and the experts divide by the mesh axes that split them, and offloading has a place."""
    rows, parts = config.data.batch_size // config.accumulate, sharding.row_parts(mesh)
    if rows % parts:
        axes = " x ".join(sharding.RULES["batch"])
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} in {config.accumulate} micro-batch(es) is {rows} rows, "
            f"not a multiple of the mesh's {axes} = {parts}; set it to a multiple of {parts * config.accumulate}"
        )
    if config.data.max_length % mesh.shape["context"]:
        raise UserError(
            f"config.data.max_length={config.data.max_length} is not a multiple of config.mesh.context="
            f"{mesh.shape['context']}, over which rows are split; set it to a multiple"
        )
    if config.model.remat == "offload":
        sharding.check_host_memory(mesh)
    experts = base.model.spec.experts
    if mesh.shape["expert"] > 1 and (experts is None or experts.count % mesh.shape["expert"]):
        has = "no experts" if experts is None else f"{experts.count} experts"
        raise UserError(
            f"config.mesh.expert={mesh.shape['expert']}: {config.model.source} has {has} to split; "
            "set it to 1 (mesh.data and mesh.fsdp split rows as well) or to a divisor"
        )


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
