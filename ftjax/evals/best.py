"""Which checkpoint of a run is "best", which "latest", and what each scores: the same for every command line."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import distributed
from ftjax.errors import UserError
from ftjax.evals import deciding
from ftjax.evals.deciding import Deciding
from ftjax.evals.entries import best_metric
from ftjax.training import metrics
from ftjax.training.checkpoint import Checkpoints

STEP_HELP = (
    "the run's checkpoint to use: best, latest or a number (default: the best by the run's own evaluation, "
    "the latest of a run without one)"
)


SET = "evaluation_set"  # in the record of an evaluation: the digest of what it was measured on


def decides(config: ConfigDict) -> Deciding | None:
    """What decides which step is best; None where nothing is evaluated. UserError for a bad config.evaluate.best."""
    if config.evaluate.best:
        return deciding.parse(config.evaluate.best)
    name, mode = best_metric(config)
    return None if name is None else Deciding(name, ((1.0, name),), mode)


def evaluations(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of evaluations, without those on another evaluation set than the newest: they compare with nothing.

    A record without a digest of its set, of an older version, counts as one of the newest.
    """
    found = [record for record in records if metrics.is_eval(record)]
    newest = next((record[SET] for record in reversed(found) if SET in record), None)
    return [record for record in found if record.get(SET, newest) == newest]


def scores(config: ConfigDict, records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """{step: value of what decides which step is best} of a run's comparable `evaluations`; NaN is left out."""
    judge = decides(config)
    found = {record["step"]: judge.value(record) for record in evaluations(records)} if judge else {}
    return {step: value for step, value in found.items() if value is not None and value == value}


def stalled(config: ConfigDict, records: Iterable[Mapping[str, Any]]) -> str:
    """Why a run with these records ends early; "" where it goes on.

    It ends with `evaluate.patience` evaluations in a row of which none is better, by more than `evaluate.min_delta`,
    than the last that was; the evaluation before step 1 is the first to compare with. Of several processes the first
    one's records count, and all call it alike.
    """
    judge, patience = decides(config), config.evaluate.patience
    if judge is None or not patience:
        return ""
    at, since = None, 0  # (step, value) of the last improvement, evaluations since then
    for record in evaluations(records):
        value = judge.value(record)
        if value is None:  # before config.evaluate.best was what it is
            continue
        if value == value and (at is None or judge.improves(value, at[1], config.evaluate.min_delta)):
            at, since = (record["step"], value), 0
        else:
            since += 1
    reason = ""
    if since >= patience:
        than = f"step {at[0]} ({at[1]:.4g})" if at else "NaN"
        reason = f"no better {judge.text} than that of {than} in {since} evaluation{'s' if since > 1 else ''}"
    return json.loads(distributed.tell(json.dumps(reason)))


class Standing(NamedTuple):
    """The checkpoints of a run and how they score."""

    metric: str | None  # None: the run has no evaluation
    mode: str  # "max" or "min": which value of the metric is better
    scores: dict[int, float]  # of all evaluated steps, whether they are kept or not
    kept: Sequence[int]  # the steps that have a checkpoint, ascending
    others: Sequence[int] = ()  # the steps that were evaluated on another set than the newest, ascending

    @classmethod
    def of(cls, config: ConfigDict, workdir: Path, kept: Sequence[int]) -> "Standing":
        judge, records = decides(config), metrics.read(workdir / "metrics.jsonl")
        compared = {record["step"] for record in evaluations(records)}
        others = sorted({record["step"] for record in records if metrics.is_eval(record)} - compared)
        return cls(judge and judge.text, judge.mode if judge else "min", scores(config, records), kept, others)

    def best(self) -> int | None:
        """The kept step that scores best, the earliest of equals; None where none has a score.

        Never step 0: older runs have a checkpoint of it, in which nothing has been trained.
        """
        return self._extreme(step for step in self.kept if step)

    def scored(self, step: int) -> str:
        """Such as "eval_loss 1.234", or that there is no score."""
        if step in self.scores:
            return f"{self.metric} {self.scores[step]:.4g}"
        return "evaluated on another set" if step in self.others else "not evaluated"

    def better_unkept(self) -> str | None:
        """A sentence where a step that cannot be loaded scored better than all that can; None else."""
        best, first = self.best(), self._extreme(self.scores)
        if best is None or self.scores[first] == self.scores[best]:
            return None
        what = "the model before training" if first == 0 else f"step {first}, which is not kept,"
        return f"{what} scored better: {self.scored(first)}"

    def incomparable(self) -> str:
        """A sentence where steps were evaluated on another set than the newest; "" else."""
        if not self.others:
            return ""
        steps = f"step {self.others[0]}" + (f" to {self.others[-1]}" if len(self.others) > 1 else "")
        return f"the scores of {steps} are of another evaluation set, and are not compared"

    def _extreme(self, steps: Iterable[int]) -> int | None:
        extreme = {"max": max, "min": min}[self.mode]
        scored = sorted(step for step in steps if step in self.scores)
        return extreme(scored, key=self.scores.__getitem__, default=None)


def choose(workdir: Path, wanted: str | None) -> int:
    """As `chosen`, said on stderr together with how the others score."""
    standing, step = chosen(workdir, wanted)
    if distributed.is_first():
        print(told(standing, step), file=sys.stderr)
    return step


def chosen(workdir: Path, wanted: str | None) -> tuple[Standing, int]:
    """(how the steps of the run in `workdir` score, the one that --step names).

    wanted: "best", "latest", a number, or None for the best where there is one and else the latest. Every process of a
    run calls it alike. Raises UserError where there is no such step.
    """
    if wanted not in (None, "best", "latest") and not wanted.isdecimal():
        raise UserError(f"--step {wanted}: it must be best, latest or the number of a step")
    config = configs.read(workdir / "config.json")
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        standing = Standing.of(config, workdir, checkpoints.steps())
        best = standing.best()
        if wanted == "best" and best is None:
            raise UserError(f"--step best: no checkpoint in {workdir} has a score; use --step latest or a number")
        if wanted == "latest" or (wanted is None and best is None):
            step = checkpoints.latest()
        else:
            step = best if wanted in (None, "best") else int(wanted)
    step = json.loads(distributed.tell(json.dumps(step)))
    if step is None:
        raise UserError(f"{workdir / 'checkpoints'} holds no checkpoint. Check --workdir, or train first.")
    return standing, step


def told(standing: Standing, step: int) -> str:
    """Which step is used, and the step and score of the best and the latest where they are others."""
    best, latest = standing.best(), max(standing.kept, default=step)
    named = {"best": best, "latest": latest}
    names = " and ".join(f"the {name}" for name, its in named.items() if its == step)
    parts = [f"using step {step}" + (f", {names}" if names else "") + f" ({standing.scored(step)})"]
    for name, its in named.items():
        if its not in (None, step):
            parts.append(f"the {name} is step {its} ({standing.scored(its)}): --step {name}")
    if better := standing.better_unkept():
        parts.append(better)
    if apart := standing.incomparable():
        parts.append(apart)
    return "; ".join(parts)
