"""What a run writes while it trains, as OpenAI's events, checkpoints and results say it."""

import csv
import io
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.training import environment, metrics

# our metric -> OpenAI's, of a step and of an evaluation; where there are several, the first that a record has
_OF_STEPS = {
    "train_loss": ("loss",),
    "train_mean_token_accuracy": ("mean_token_accuracy",),
    "train_accuracy": ("rewards/accuracies",),
    "train_mean_reward": ("reward",),
}
_OF_EVALUATIONS = {
    "full_valid_loss": ("eval_loss",),
    "full_valid_mean_token_accuracy": ("eval_mean_token_accuracy",),
    "full_valid_accuracy": ("eval_rewards/accuracies",),
    "full_valid_mean_reward": ("eval_validation/grader",),
}
_RESULTS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_REWARDS = ("train_mean_reward", "valid_mean_reward")  # where there are some
_RECENT = 20  # steps of which the median says how long the others will take


class Told(NamedTuple):
    """An event of a run: what it says, and its numbers."""

    message: str
    data: dict[str, float]


class Run(NamedTuple):
    """A run as its workdir shows it; `total` is 0 until it has counted its steps."""

    records: list[dict[str, Any]]
    total: int
    saved: list[int]  # steps, in order


def look(workdir: Path) -> Run:
    """Reads the workdir, also while the run writes to it."""
    starts = environment.read(workdir)
    folder = workdir / "checkpoints"
    saved = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    return Run(metrics.read(workdir / "metrics.jsonl"), starts[-1]["steps"] if starts else 0, saved)


def events(run: Run, step: int, evaluated: int) -> list[Told]:
    """Those of the steps after `step`, and of evaluations after `evaluated`, in their order."""
    told = []
    for record in run.records:
        is_eval = metrics.is_eval(record)
        if record["step"] <= (evaluated if is_eval else step):
            continue
        measured = _numbers(record)
        if is_eval:
            parts = [("full validation loss", "full_valid_loss"), ("validation reward", "full_valid_mean_reward")]
        else:
            parts = [("training loss", "train_loss"), ("mean reward", "train_mean_reward")]
        said = ", ".join(f"{name}={measured[key]:.4g}" for name, key in parts if key in measured)
        if said:
            told.append(Told(f"Step {record['step']}/{run.total or '?'}: {said}", {"step": record["step"], **measured}))
    return told


def at(run: Run, step: int) -> dict[str, float]:
    """The metrics of a checkpoint: of its step, and of the evaluation there."""
    found: dict[str, float] = {"step": step}
    for record in run.records:
        if record["step"] == step:
            found |= _numbers(record)
    for name in ("loss", "mean_token_accuracy", "mean_reward"):  # the whole file is evaluated, not a batch of it
        if f"full_valid_{name}" in found:
            found[f"valid_{name}"] = found[f"full_valid_{name}"]
    return found


def finish(run: Run) -> int | None:
    """When the last step will have been made, in seconds since 1970, if the next steps take as long as the last."""
    times = [record["step_time"] for record in run.records if "step_time" in record][-_RECENT:]
    if not times or not run.total:
        return None
    return int(time.time() + (run.total - run.records[-1]["step"]) * statistics.median(times))


def tokens(run: Run) -> int:
    """That were trained on, each as often as it was seen."""
    return next((int(record["num_tokens"]) for record in reversed(run.records) if "num_tokens" in record), 0)


def results(run: Run) -> str:
    """The CSV of a job's result file, a row a step; what was not measured there is empty."""
    rows: dict[int, dict[str, Any]] = {}
    for step in sorted({record["step"] for record in run.records if record["step"]}):
        found = at(run, step)
        found["train_accuracy"] = found.get("train_mean_token_accuracy", found.get("train_accuracy"))
        rows[step] = {name: found.get(name) for name in (*_RESULTS, *_REWARDS)}
    used = [*_RESULTS, *(name for name in _REWARDS if _any(rows.values(), name))]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(used)
    writer.writerows([["" if row[name] is None else row[name] for name in used] for row in rows.values()])
    return text.getvalue()


def epochs_ends(saved: Sequence[int], every: int, share: int) -> list[int]:
    """Of the steps that are saved those that are listed as checkpoints: about the ends of epochs."""
    return [step for step in saved if every and step % (every * share) == 0]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    table = _OF_EVALUATIONS if metrics.is_eval(dict(record)) else _OF_STEPS
    found = {theirs: next((record[name] for name in ours if name in record), None) for theirs, ours in table.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _any(rows: Iterable[Mapping[str, Any]], name: str) -> bool:
    return any(row[name] is not None for row in rows)
