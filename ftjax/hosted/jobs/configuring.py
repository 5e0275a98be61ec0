"""A job as the config of an ordinary run.

The hyperparameters of a request, and what "auto" stands for:

    batch_size                a step sees so many rows (of reinforcement: prompts); auto: by the number of rows, as
                              `data.batch.sizes` says
    n_epochs                  auto: the method's usual number, more for few rows, as there
    learning_rate_multiplier  of the method's usual learning rate for the width of the model; auto: 1
    beta                      of DPO; auto: 0.1
    compute_multiplier        of the 8 completions that a prompt gets; auto: 1
    eval_interval             steps; auto: evaluations are an epoch apart
    eval_samples              completions of each prompt of an evaluation; auto: 1
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.config import GRADER, KEYS
from ftjax.config_checks import check_type
from ftjax.errors import UserError
from ftjax.hosted.jobs.tables import Job

OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
KEPT = 3  # checkpoints of a job, the newest
_SAMPLES = 8  # completions of a prompt
_BETA = 0.1
_SAVES = 100  # steps at most between two saves, from which a job goes on where its machine was lost

# Keys that follow from the request, or that the server relies on.
_OWN = (
    *("data.train", "data.eval", "data.packing", "data.batch_size", "data.holdout", "objective.name"),
    *("objective.beta", "objective.rewards", "optimizer.learning_rate", "epochs", "steps", "seed", "log_every"),
    *("eval_every", "eval_epochs", "evaluate.before", "evaluate.samples", "checkpoint_every", "checkpoint.keep"),
    *("export_formats", "adapter.source", "adapter.kind", "rollouts.samples"),
)


class Data(NamedTuple):
    """What is known of a job's rows once they were looked at, as `ftjax.inspect_data` reports it.

    Attributes:
      rows: of an epoch.
      batch_size, epochs, learning_rate: what the run would choose, where they are open.
      row_length: for the longest of them; a run that is given a batch would make room for the longest that may be.
    """

    rows: int
    batch_size: int
    row_length: int
    epochs: float
    learning_rate: float


def check_settings(settings: Mapping[str, Any]) -> None:
    """UserError where the config keys that all jobs of a server share are unknown, mistyped, or not the server's to
    set."""
    for key, value in settings.items():
        if key not in KEYS:
            raise UserError(f"settings of jobs: there is no config key {key!r}; ftjax/config.py lists them")
        if key in _OWN:
            raise UserError(f"settings of jobs: {key} follows from each request; leave it out")
        default, check = KEYS[key]
        check_type(key, value, default)
        if key != "model.source" and not check.holds(value):
            raise UserError(f"settings of jobs: {key}={value!r}: it must be {check.wanted}")
    if settings.get("model.vision"):
        raise UserError("settings of jobs: model.vision is not served: a client's rows could name files of the server")
    if not settings.get("model.source"):
        raise UserError("settings of jobs: model.source is missing; name the base that is fine-tuned")


def config(
    job: Job,
    settings: Mapping[str, Any],
    train: Path,
    heldout: Path | None,
    grader: Path | None = None,
    data: Data | None = None,
) -> dict[str, Any]:
    """{dotted key: value} of the run.

    Args:
      settings: config keys that all jobs share, model.source among them.
      train, heldout: the files of rows; grader: that of what is rewarded.
      data: of the rows; None while they are still to be looked at.
    """
    asked = job.hyperparameters
    out = {
        **_applying(job, settings),
        "objective.name": OBJECTIVES[job.method],
        "data.train": [str(train)],
        "data.eval": [_evaluated(heldout, grader)] if heldout else [],
        "data.packing": False,  # so that a row of a batch is an example, as clients count them
        "evaluate.before": False,
        "seed": job.seed,
        "log_every": 1,
        "checkpoint.keep": KEPT,
        "export_formats": ["peft"],
    }
    if job.adapter is not None:
        out["adapter.source"] = job.adapter
    if heldout and job.hyperparameters.get("eval_interval", "auto") != "auto":
        out["eval_every"] = asked["eval_interval"]
    elif heldout:
        out["eval_epochs"] = 1.0
    if job.method == "dpo":
        out["objective.beta"] = _BETA if asked["beta"] == "auto" else asked["beta"]
    if job.method == "reinforcement":
        out["rollouts.samples"] = samples(asked)
        out["objective.rewards"] = [f"{GRADER}:{grader}"]
        out["evaluate.samples"] = 1 if asked["eval_samples"] == "auto" else asked["eval_samples"]
    if asked["n_epochs"] != "auto":
        out["epochs"] = float(asked["n_epochs"])
    if data is not None:
        factor = 1.0 if asked["learning_rate_multiplier"] == "auto" else asked["learning_rate_multiplier"]
        data = settled(job, data)
        out |= {"data.batch_size": data.batch_size, "data.row_length": data.row_length, "epochs": data.epochs}
        out["optimizer.learning_rate"] = float(f"{data.learning_rate * factor:.4g}")
        out["checkpoint_every"] = saves(job, data)[0]
    return out


def settled(job: Job, data: Data) -> Data:
    """With the batch that the request asks for."""
    asked = job.asked["batch_size"]
    return data if asked == "auto" else data._replace(batch_size=asked * _each(job))


def _each(job: Job) -> int:
    """Rows of a batch that a row of the data makes: completions of a prompt."""
    return samples(job.asked) if job.method == "reinforcement" else 1


def _applying(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that a run would refuse: an adapter has its own, rollouts are of reinforcement."""
    sections = {"adapter": job.adapter is None, "rollouts": job.method == "reinforcement"}
    return {key: value for key, value in settings.items() if sections.get(key.partition(".")[0], True)}


def _evaluated(heldout: Path, grader: Path | None) -> Any:
    """The entry of data.eval: rows have a loss, or where a grader rewards the answers that it gives."""
    return {"source": str(heldout), "score": f"{GRADER}:{grader}"} if grader else str(heldout)


def samples(asked: Mapping[str, Any]) -> int:
    """Completions of a prompt: two at least, for they are compared with each other."""
    factor = 1.0 if asked["compute_multiplier"] == "auto" else asked["compute_multiplier"]
    return max(2, round(_SAMPLES * factor))


def resolved(job: Job, data: Data) -> dict[str, Any]:
    """The hyperparameters of a job without "auto"."""
    data = settled(job, data)
    chosen = {
        "batch_size": data.batch_size // _each(job),
        "n_epochs": math.ceil(data.epochs),
        "learning_rate_multiplier": 1.0,
        "beta": _BETA,
        "compute_multiplier": 1.0,
        "eval_interval": _steps(job, data),
        "eval_samples": 1,
    }
    return {name: chosen[name] if value == "auto" else value for name, value in job.asked.items()}


def _steps(job: Job, data: Data) -> int:
    """Of an epoch."""
    return math.ceil(data.rows * _each(job) / settled(job, data).batch_size)


def saves(job: Job, data: Data) -> tuple[int, int]:
    """(steps between two saves, saves in an epoch, of which one is listed as a checkpoint)."""
    steps = _steps(job, data)
    count = math.ceil(steps / _SAVES)
    return max(1, math.ceil(steps / count)), count
