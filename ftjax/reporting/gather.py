"""The files of a workdir, of a finished run, one in progress or an old one, as one plain structure."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import origin
from ftjax.errors import UserError
from ftjax.evals.best import Standing
from ftjax.evals.deciding import smaller_is_better
from ftjax.evals.general import METRICS as GENERAL
from ftjax.reporting import evaluation as evaluations
from ftjax.reporting.charts import figure, share
from ftjax.reporting.evaluation import Evaluation
from ftjax.training import environment, metrics
from ftjax.training.checkpoint import complete_steps

# Last words of the names of metrics.
_SHARES = ("accuracy", "accuracies")


class Sample(NamedTuple):
    """A prompt with two answers to it. What is not known is None."""

    prompt: str
    expected: str | None
    before: str | None
    after: str
    score_before: float | None
    score_after: float | None


class Samples(NamedTuple):
    name: str  # of the scored set
    before: str  # what answered before, such as "step 0"
    after: str
    samples: Sequence[Sample]


class Cost(NamedTuple):
    """Attributes:
    device_seconds: of all starts from beginning to end; None where no start is recorded.
    step_seconds: what the steps alone took, by the step times in the records; None without any.
    """

    device_seconds: float | None
    step_seconds: float | None


class Run(NamedTuple):
    """Attributes:
    records: of metrics.jsonl.
    steps: how many there are to be; None where that is not recorded.
    step: whose result is shown: the one evaluated, else the best that is kept, else the last; 0 before the first.
    starts: of environment.json.
    chosen: the keys of the config that the run chose itself.
    """

    workdir: Path
    config: ConfigDict
    records: list[dict[str, Any]]
    steps: int | None
    step: int
    standing: Standing
    samples: list[Samples]
    evaluation: Evaluation | None
    starts: list[dict[str, Any]]
    chosen: Sequence[str]

    @property
    def done(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def stale(self) -> bool:
        """Whether the evaluation is of another step than a command would use."""
        evaluated = self.evaluation.step if self.evaluation else None
        return evaluated is not None and evaluated != (self.standing.best() or max(self.standing.kept, default=0))


class Change(NamedTuple):
    """An evaluation metric.

    Attributes:
      before: before training; None where it was not measured then.
      after: at the step that is shown.
      last: at the last step that was evaluated.
      mode: which values are better, "max" or "min"; "" where that is not known.
    """

    name: str
    before: float | None
    after: float
    last: float
    share: bool
    mode: str

    def shown(self, value: float) -> str:
        return share(value) if self.share else figure(value)

    @property
    def better(self) -> bool | None:
        """None where nothing changed, the start was not measured, or nobody knows which way is better."""
        if self.before is None or self.before == self.after or not self.mode:
            return None
        return (self.after > self.before) == (self.mode == "max")


def gather(workdir: Path, step: int | None = None) -> Run:
    """step: whose result is wanted, without an evaluation of another; None: see `Run`.

    Raises UserError where a file there is damaged, or it is no workdir of a run.
    """
    config = configs.read(workdir / "config.json")
    try:
        records = metrics.read(workdir / "metrics.jsonl")
        damaged = [record for record in records if not isinstance(record, dict) or type(record.get("step")) is not int]
        if damaged:
            raise ValueError(f"a record without a step: {str(damaged[0])[:80]}")
    except ValueError as error:
        raise UserError(f"{workdir / 'metrics.jsonl'}: {error}; remove the line that is not a record") from error
    standing = Standing.of(config, workdir, complete_steps(workdir / "checkpoints"))
    starts = _starts(workdir)
    evaluation = evaluations.read(workdir / evaluations.FILE)
    if evaluation and starts and (workdir / evaluations.FILE).stat().st_mtime < starts[0]["began"]:
        evaluation = None  # of another run, which was here before
    if step is None:
        step = evaluation.step if evaluation and evaluation.step is not None else standing.best()
    elif evaluation and evaluation.step != step:
        evaluation = None
    evaluated = [record["step"] for record in records if metrics.is_eval(record)]
    if step is None:
        step = max(evaluated or [record["step"] for record in records], default=0)
    return Run(
        workdir,
        config,
        records,
        starts[-1]["steps"] if starts else config.steps or None,
        step,
        standing,
        _samples(workdir, step, evaluation),
        evaluation,
        starts,
        _chosen(workdir),
    )


def changes(run: Run) -> list[Change]:
    """The evaluation metrics at the step that is shown, the one that decides which step is best first."""
    trained = {name for record in run.records for name in record if not name.startswith("eval_")}
    values: dict[str, dict[int, float]] = {}
    for record in run.records:
        for name, value in record.items():
            if name.startswith("eval_") and is_finite(value):
                values.setdefault(name, {})[record["step"]] = value
    found = []
    decides = run.standing.metric or ""  # a metric, or a sum that begins with what counts most
    for name in sorted(values, key=lambda name: decides.find(name) if name in decides else len(decides)):
        of_steps = values[name]
        step = max((step for step in of_steps if step <= run.step), default=None)
        if step is not None:
            before = of_steps[0] if step and 0 in of_steps else None
            mode = run.standing.mode if name == decides else mode_of(name, trained)
            percent = shows_share(mode, list(of_steps.values()))
            found.append(Change(name, before, of_steps[step], of_steps[max(of_steps)], percent, mode))
    return found


def shows_share(mode: str, values: Sequence[float]) -> bool:
    """Whether values are shown in percent: of what is better the larger it is, if all are from 0 to 1."""
    return mode == "max" and all(0 <= value <= 1 for value in values)


def mode_of(name: str, trained: set[str]) -> str:
    """Which values of a metric are better, "max" or "min"; "" where that cannot be said.

    trained: the names of what is recorded of every step.
    """
    if smaller_is_better(name):
        return "min"
    # What a set is scored by, and not a figure of the objective over held-out rows, which may mean anything.
    scored = name.startswith("eval_") and "/" in name and name.removeprefix("eval_") not in trained
    return "max" if scored or name.endswith(_SHARES) else ""


def summary(run: Run) -> list[str]:
    """What came of a run, in a few sentences: whether it helped, as far as what was measured tells, then the rest.

    Of a run that was not evaluated, that this is not known.
    """
    evaluation, found = run.evaluation, changes(run)
    if evaluation and evaluation.verdict:
        sentences = [evaluation.verdict]
    elif found:
        sentences = [_verdict(found.pop(0), run.step)]
    else:
        sentences = ["Whether training helped is not known: this run was not evaluated on rows held out from training."]
    for change in found:
        if not change.mode or change.name.startswith(GENERAL):
            continue
        after = f"{change.shown(change.after)} at step {run.step}"
        if change.before is None:
            sentences.append(f"{change.name} {after}")
        else:
            word = {None: "unchanged", True: "better", False: "worse"}[change.better]
            sentences.append(f"{change.name} {change.shown(change.before)} before training, {after}: {word}")
    return sentences + _forgotten(run, found)


def _verdict(main: Change, step: int) -> str:
    after = f"{main.shown(main.after)} at step {step}"
    if main.before is None:
        return f"{main.name} is {after}. It was not measured before training, so whether that helped is not known."
    if main.before == main.after:
        return f"Training changed nothing: {main.name} {after}, as before."
    helped = {None: "Training made a difference", True: "Training helped", False: "Training made it worse"}
    return f"{helped[main.better]}: {main.name} {main.shown(main.before)} before, {after}."


def _forgotten(run: Run, found: Sequence[Change]) -> list[str]:
    """What is known of it: by the evaluation, or else by what was measured during training."""
    forgetting = run.evaluation.forgetting if run.evaluation else None
    if forgetting and forgetting.verdict:
        return [forgetting.verdict]
    change, ends = (forgetting.change, forgetting.interval) if forgetting else (None, None)
    if change is None:
        change = next((one.after for one in found if one.name == f"{GENERAL}change"), None)
    if change is None:
        return []
    return [f"cross-entropy of general text {change:+.3g} nats per token{interval(ends)} against the base"]


def interval(ends: Sequence[float] | None, scale: float = 1.0) -> str:
    """Such as " [0.33, 0.49]", or nothing."""
    return f" [{ends[0] * scale:.3g}, {ends[1] * scale:.3g}]" if ends else ""


def cost(run: Run) -> Cost:
    """What the run took. Steps between two records are taken to last as long as the one recorded."""
    seconds = None
    if run.starts:
        spans = [(start, environment.ended(run.workdir, start) - start["began"]) for start in run.starts]
        seconds = sum(span * start["devices"]["count"] for start, span in spans)
    of_steps, before = None, 0
    for record in run.records:
        if is_finite(record.get("step_time")):
            of_steps = (of_steps or 0.0) + record["step_time"] * (record["step"] - before)
        if "loss" in record:
            before = record["step"]
    return Cost(seconds, of_steps)


def names(workdirs: Sequence[Path]) -> list[str]:
    """Short names that differ: the last parts of the paths, as many as that takes."""
    paths = [Path(os.path.abspath(workdir)) for workdir in workdirs]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        short = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(short)) == len(set(paths)):
            break
    return short


def is_finite(value: Any) -> bool:
    """Whether a value of a file is a number that can be drawn and compared."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _starts(workdir: Path) -> list[dict[str, Any]]:
    try:
        starts = environment.read(workdir)
        for start in starts:  # what is computed with; all else is shown as it is
            float(start["began"]), int(start["devices"]["count"]), int(start["steps"])
    except (ValueError, KeyError, TypeError) as error:
        file = workdir / environment.FILE
        raise UserError(f"{file}: damaged ({error!r}); remove it, and the report does without") from error
    return starts


def _chosen(workdir: Path) -> Sequence[str]:
    try:
        return json.loads((workdir / origin.FILE).read_text(encoding="utf-8")).get("chosen", ())
    except FileNotFoundError:
        return ()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{workdir / origin.FILE}: damaged ({error}); restore it from a copy") from error


def _samples(workdir: Path, step: int, evaluation: Evaluation | None) -> list[Samples]:
    """Of every scored set: those of the evaluation, or those of samples.jsonl where these are more."""
    found = {}
    for source, steps in _of_file(workdir / "samples.jsonl").items():
        upto = [number for number in steps if number <= step]
        last, first = max(upto or steps), min(steps)
        before = _before(steps[first], steps[last]) if first != last else []
        label = "before training" if first == 0 else f"step {first}"
        pairs = [_pair(old, sample) for old, sample in zip(before or [{}] * len(steps[last]), steps[last], strict=True)]
        found[source] = Samples(source, label if before else "", f"step {last}", pairs)
    for scored in evaluation.sets if evaluation else ():
        by_kind = {contestant.kind: contestant.name for contestant in reversed(scored.contestants)}
        base, tuned = by_kind.get("base", "base"), by_kind.get("tuned", "tuned")
        pairs = [
            Sample(
                answers.prompt,
                answers.expected or None,
                answers.completions.get(base),
                answers.completions[tuned],
                answers.scores.get(base),
                answers.scores.get(tuned),
            )
            for answers in scored.samples
            if tuned in answers.completions
        ]
        if len(pairs) >= max(len(found[scored.name].samples) if scored.name in found else 0, 1):
            found[scored.name] = Samples(scored.name, base, tuned, pairs)
    return list(found.values())


def _before(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each new sample the old one of the same question, {} without.

    By place where the questions are the same, since the prompts of several may end alike; else by their last turn.
    """
    if [sample["prompt"] for sample in old] == [sample["prompt"] for sample in new]:
        return old
    by_prompt = {sample["prompt"]: sample for sample in old}
    return [by_prompt.get(sample["prompt"], {}) for sample in new]


def _pair(before: dict[str, Any], after: dict[str, Any]) -> Sample:
    scores = [sample["score"] if is_finite(sample.get("score")) else None for sample in (before, after)]
    expected = after.get("expected")
    return Sample(
        after["prompt"],
        None if expected is None else str(expected),
        before.get("completion"),
        after["completion"],
        *scores,
    )


def _of_file(path: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """{source: {step: samples}}."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for number, line in _lines(path):
        try:
            sample = json.loads(line)
            texts = {name: _text(sample[name]) for name in ("prompt", "completion")}
            found.setdefault(str(sample["source"]), {}).setdefault(int(sample["step"]), []).append(sample | texts)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a sample ({error!r}); remove the line") from error
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
