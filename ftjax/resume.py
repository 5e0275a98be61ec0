"""Going on with a run that a workdir holds: what is there, whether it may go on, and the state to go on from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ftjax import assemble, config_changes, distributed, origin, sharding, tree
from ftjax import config as configs
from ftjax.assemble import Base, Program
from ftjax.data.batch.loader import Loader
from ftjax.data.tokens import templates
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.method import iterations, learning_rate
from ftjax.objectives.reference import REFERENCE, frozen_with_reference
from ftjax.training import metrics, optim
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.loop import Start
from ftjax.training.state import init_state
from ftjax.tree import Tree


class Resume(NamedTuple):
    """What a workdir holds of a run.

    Attributes:
      step: of the checkpoint to go on from; None where there is none, and a fresh run begins.
      config: the run's, when it was last started.
      records: of metrics.jsonl.
      evaluated: the steps whose evaluation is among them.
    """

    step: int | None
    config: ConfigDict | None
    records: list[dict[str, Any]]
    evaluated: set[int]

    def finished(self, config: ConfigDict, total_steps: int) -> bool:
        return self.step == total_steps and (total_steps in self.evaluated or not configs.evaluates(config))

    def ended_early(self, config: ConfigDict) -> str:
        """Why the run is at its end before its last step; "" where it is not. All processes call it alike."""
        return best.stalled(config, self.reached()) if self.step in self.evaluated else ""

    def reached(self) -> list[dict[str, Any]]:
        """The records of what the checkpoint to go on from has behind it."""
        return [] if self.step is None else [record for record in self.records if record["step"] <= self.step]


def find(config: ConfigDict, mesh: Mesh, workdir: Path, checkpoints: Checkpoints) -> tuple[ConfigDict, Resume]:
    """(the config, what there is to go on from). Of a run that goes on, the config has what the run chose when it began
    where it leaves that open, and names that lead somewhere from here (`origin.at_hand`).

    Raises:
      UserError: the run there has another config.
    """
    step = checkpoints.latest() if config.checkpoint.resume_step < 0 else config.checkpoint.resume_step
    named = {"data.chat_template": templates.located(config.data.chat_template)}
    named |= {"objective.rewards": origin.located_rewards(config), "objective.judge": origin.located_judge(config)}
    config = configs.changed(config, named)
    if step is None:
        return config, Resume(None, None, [], set())
    before = configs.read(workdir / "config.json")
    if not before.optimizer.learning_rate:  # older runs left it open in their config, too, and took the method's own
        before = configs.changed(before, {"optimizer.learning_rate": learning_rate(before)})
    leaves_open, config = config, configs.with_recorded(config, before)
    if not leaves_open.accumulate and config.data.batch_size % (config.accumulate * sharding.row_parts(mesh)):
        config = configs.changed(config, {"accumulate": 0})  # this mesh does not allow what the last one did
    configs.validate(config)  # what is given now beside what was chosen then
    if config.steps and config.epochs != before.epochs:
        raise UserError(
            f"config.epochs={config.epochs:g}: config.steps={config.steps} decides how long this run is; set "
            "--config.steps to more, or to 0"
        )
    # The base of an older run is known by its name alone.
    places = configs.PLACES if origin.is_recorded(workdir) else ("data.train",)
    if changed := config_changes.changes(before, config, places):
        raise UserError(
            f"{workdir} holds a run with another config; give these their old values or choose another --workdir:\n  "
            + "\n  ".join(changed)
        )
    records = metrics.read(workdir / "metrics.jsonl")
    # What the first process reads decides: another host may still see an older file.
    evaluated = json.loads(
        distributed.tell(json.dumps([record["step"] for record in records if metrics.is_eval(record)]))
    )
    return origin.at_hand(config, workdir), Resume(step, before, records, set(evaluated))


def steps_of(config: ConfigDict, loader: Loader) -> int:
    """How many steps a config asks for."""
    return config.steps or loader.batches_in(config.epochs) * iterations(config)


def going_on(config: ConfigDict, step: int, before: int, now: int) -> str:
    """What it means that a run of `before` steps goes on after `step` to `now` of them."""
    steps = np.arange(step)
    old, new = (optim.make_schedule(learning_rate(config), config.schedule, count) for count in (before, now))
    text = f"this run of {before} steps goes on after step {step} to {now}"
    if np.array_equal(old(steps), new(steps)):
        return f"{text}, as one of {now} steps from the start"
    return (
        f"{text}. Its learning rate was that of {before} steps, {old(step - 1):.2g} in the last, and is that of {now} "
        f"from here, {new(step):.2g} in the next: a run of {now} steps from the start would be another"
    )


def extended(given: ConfigDict, config: ConfigDict, workdir: Path) -> str:
    """What a command that leaves the epochs open takes over where the run was given others since it began; "" else.

    given, config: of the command, and the same with what the run in `workdir` has where that leaves it open.
    """
    began = origin.epochs(workdir)
    if given.epochs or config.steps or began in (None, config.epochs):
        return ""
    goal = f"the run goes on to {config.epochs:g}, as it was told since it began with {began:g}"
    return f"config.epochs is left open: {goal}"


def other_evaluation(before: ConfigDict, now: ConfigDict) -> str:
    """What it means that a run goes on with other evaluation rows than it had; "" where it has the same.

    before, now: configs, both `origin.located`.
    """
    if configs.as_json(before)["data"]["eval"] == configs.as_json(now)["data"]["eval"]:
        return ""
    return (
        "warning: config.data.eval is not what it was: where its rows are others, the next evaluation begins anew, and "
        "only its scores and later ones are compared to find the best step"
    )


def check_data(meta: Mapping[str, Any], workdir: Path, fingerprint: str) -> None:
    """UserError where the data is not what the run in `workdir` began with. meta: that of a checkpoint of it."""
    if meta["data"] != fingerprint:
        config = configs.read(workdir / "config.json")
        # So, too, says `configs.read` of a run that is older than the key.
        cut = "; it cut long texts: --config.data.long_text=cut" if config.data.long_text == "cut" else ""
        ptx = f", config.data.ptx={list(config.data.ptx)}" if config.data.ptx else ""
        raise UserError(
            f"{workdir}: the training data, its tokenizer or its chat template is not what this run began with (then "
            f"config.data.train={list(config.data.train)}{ptx}); restore it, say where it is now, or choose another "
            f"--workdir{cut}"
        )


def start(
    there: Resume,
    config: ConfigDict,
    base: Base,
    program: Program,
    workdir: Path,
    checkpoints: Checkpoints,
    fingerprint: str,
    begin: Callable[[Tree], None] = lambda variables: None,
) -> Start:
    """The state to begin with: fresh, or that of the checkpoint that is there; later checkpoints are set aside.

    The reference of a method that has one is rebuilt from the base and the seed, or the adapter that training went on
    from, in both cases alike. fingerprint: of the data. begin: called with the variables that the run began with.

    Raises:
      UserError: the checkpoint is damaged or does not fit; the data is not what the run began with.
    """
    variables = assemble.load_variables(config, base, program.variables)
    begin(variables)
    trainable, frozen = tree.partition(variables, program.is_trained)
    del variables  # the step donates the state: no second copy may stay alive
    if REFERENCE in program.frozen:
        frozen = frozen_with_reference(frozen, trainable)
    if there.step is None:
        if REFERENCE in program.frozen:  # which stays when the step donates what is trained
            trainable = jax.tree.map(jnp.copy, trainable)
        return Start(init_state(program.optimizer, trainable, program.state, program.kept), frozen)
    del trainable
    _, state, meta = checkpoints.restore(program.state, there.step)
    check_data(meta, workdir, fingerprint)
    checkpoints.rewind(there.step)
    checkpoints.rate(best.scores(config, there.reached()))
    return Start(state, frozen, there.step, meta["num_tokens"], evaluated=there.step in there.evaluated)
