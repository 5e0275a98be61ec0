"""Going on with a run that a workdir holds: what is there, whether it may go on, and the state to go on from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax import assemble, distributed, tree
from ftjax import config as configs
from ftjax.assemble import Base, Program
from ftjax.errors import UserError
from ftjax.evals.evaluator import best_metric, is_eval
from ftjax.objectives.reference import REFERENCE, frozen_with_reference
from ftjax.training import metrics
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.loop import Start
from ftjax.training.state import init_state
from ftjax.weights.peft import continued


class Resume(NamedTuple):
    """What a workdir holds of a run.

    Attributes:
      step: of the checkpoint to go on from; None where there is none, and a fresh run begins.
      records: of metrics.jsonl.
      evaluated: the steps whose evaluation is among them.
    """

    step: int | None
    records: list[dict[str, Any]]
    evaluated: set[int]

    def finished(self, config: ConfigDict, total_steps: int) -> bool:
        return self.step == total_steps and (total_steps in self.evaluated or not configs.evaluates(config))


def find(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> Resume:
    """What there is to go on from; a fresh run with an adapter of its own to go on from pins that.

    Raises:
      UserError: the run there has another config, or its adapter has changed.
    """
    step = checkpoints.latest() if config.checkpoint.resume_step < 0 else config.checkpoint.resume_step
    if step is not None and (changed := configs.changes(configs.read(workdir / "config.json"), config)):
        raise UserError(
            f"{workdir} holds a run with another config; give these their old values or choose another --workdir:\n  "
            + "\n  ".join(changed)
        )
    if distributed.is_first() or step is not None:
        continued.pin(config, workdir, fresh=step is None)
    records = [] if step is None else metrics.read(workdir / "metrics.jsonl")
    # What the first process reads decides: another host may still see an older file.
    evaluated = json.loads(distributed.tell(json.dumps([record["step"] for record in records if is_eval(record)])))
    return Resume(step, records, set(evaluated))


def start(
    there: Resume,
    config: ConfigDict,
    base: Base,
    program: Program,
    workdir: Path,
    checkpoints: Checkpoints,
    fingerprint: str,
) -> Start:
    """The state to begin with: fresh, or that of the checkpoint that is there; later checkpoints are set aside.

    The reference of a method that has one is rebuilt from the base and the seed, or the adapter that training went on
    from, in both cases alike. fingerprint: of the data.

    Raises:
      UserError: the checkpoint is damaged or does not fit; the data is not what the run began with.
    """
    variables = assemble.load_variables(config, base, program.variables)
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
    if meta["data"] != fingerprint:
        raise UserError(
            f"{workdir}: the training data, its tokenizer or its chat template is not what this run began with; "
            "restore it or choose another --workdir"
        )
    checkpoints.rewind(there.step)
    name, _ = best_metric(config)
    for record in there.records:
        if name in record and record["step"] <= there.step:
            checkpoints.score(record["step"], record[name])
    return Start(state, frozen, there.step, meta["num_tokens"], evaluated=there.step in there.evaluated)
