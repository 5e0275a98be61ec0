"""Going on with a run that a workdir holds: what is there, whether it may go on, and the state to go on from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed
from ftjax.data.batch.loader import Loader
from ftjax.errors import UserError
from ftjax.evals.evaluator import best_metric, is_eval
from ftjax.training import metrics
from ftjax.training.checkpoint import Checkpoints
from ftjax.training.state import TrainState
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


def restore(
    resume: Resume, config: ConfigDict, workdir: Path, checkpoints: Checkpoints, abstract: TrainState, loader: Loader
) -> tuple[TrainState, int]:
    """The state of `resume.step`, and the number of tokens seen before it; later steps are set aside.

    Raises:
      UserError: the checkpoint is damaged or does not fit; the data is not what the run began with.
    """
    _, state, meta = checkpoints.restore(abstract, resume.step)
    if meta["data"] != loader.fingerprint():
        raise UserError(
            f"{workdir}: the training data, its tokenizer or its chat template is not what this run began with; "
            "restore it or choose another --workdir"
        )
    checkpoints.rewind(resume.step)
    name, _ = best_metric(config)
    for record in resume.records:
        if name in record and record["step"] <= resume.step:
            checkpoints.score(record["step"], record[name])
    return state, meta["num_tokens"]
