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
from ftjax.evals.evaluator import best_metric
from ftjax.training import metrics
from ftjax.training.checkpoint import Checkpoints

STEP_HELP = (
    "the run's checkpoint to use: best, latest or a number (default: the best by the run's own evaluation, "
    "the latest of a run without one)"
)


def scores(config: ConfigDict, records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """{step: value of the metric that decides which step is best} of a run's records; NaN is left out."""
    name, _ = best_metric(config)
    found = {record["step"]: record[name] for record in records if name in record}
    return {step: value for step, value in found.items() if value == value}


class Standing(NamedTuple):
    """The checkpoints of a run and how they score."""

    metric: str | None  # None: the run has no evaluation
    mode: str  # "max" or "min": which value of the metric is better
    scores: dict[int, float]  # of all evaluated steps, whether they are kept or not
    kept: Sequence[int]  # the steps that have a checkpoint, ascending

    @classmethod
    def of(cls, config: ConfigDict, workdir: Path, kept: Sequence[int]) -> "Standing":
        return cls(*best_metric(config), scores(config, metrics.read(workdir / "metrics.jsonl")), kept)

    def best(self) -> int | None:
        """The kept step that scores best, the earliest of equals; None where none has a score.

        Never step 0: older runs have a checkpoint of it, in which nothing has been trained.
        """
        return self._extreme(step for step in self.kept if step)

    def scored(self, step: int) -> str:
        """Such as "eval_loss 1.234", or that there is no score."""
        return f"{self.metric} {self.scores[step]:.4g}" if step in self.scores else "not evaluated"

    def better_unkept(self) -> str | None:
        """A sentence where a step that cannot be loaded scored better than all that can; None else."""
        best, first = self.best(), self._extreme(self.scores)
        if best is None or self.scores[first] == self.scores[best]:
            return None
        what = "the model before training" if first == 0 else f"step {first}, which is not kept,"
        return f"{what} scored better: {self.scored(first)}"

    def _extreme(self, steps: Iterable[int]) -> int | None:
        extreme = {"max": max, "min": min}[self.mode]
        scored = sorted(step for step in steps if step in self.scores)
        return extreme(scored, key=self.scores.__getitem__, default=None)


def choose(workdir: Path, wanted: str | None) -> int:
    """The step of the run in `workdir` that --step names, said on stderr together with how the others score.

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
    if distributed.is_first():
        print(told(standing, step), file=sys.stderr)
    return step


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
    return "; ".join(parts)
