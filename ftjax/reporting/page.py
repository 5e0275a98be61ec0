"""The page of a run, or of several beside each other: one file that loads nothing and reads without a script.

All text is escaped by the templates; characters that would turn the text around them, or break the file, are spelled
out. A content security policy forbids every request and every script and style but the page's own.
"""

import datetime
import itertools
import shlex
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.errors import UserError
from ftjax.reporting import charts, curves, gather
from ftjax.reporting.charts import figure, share
from ftjax.reporting.differences import Pieces, differences
from ftjax.reporting.evaluation import Contestant
from ftjax.reporting.gather import Run, Sample, Samples
from ftjax.reporting.harmless import digest, spelled

FILE = "report.html"
MAX_SAMPLES = 50  # of a set
OPEN_SAMPLES = 3  # of an outcome; the others are folded away
MAX_CHARACTERS = 3000  # of a text
_PROMPTS = ("base", "shots", "retrieved", "instruction")  # kinds of contestants: the base, however it is asked
_GENERATOR = '<meta name="generator" content="ftjax.report">'


class Group(NamedTuple):
    """Samples with the same outcome, the worst first, and how many there are of them in all."""

    title: str
    count: int
    samples: Sequence[Sample]


def write(workdirs: Sequence[Path], out: Path) -> None:
    """Writes the page of one run, or the comparison of several. Replaces nothing but such a page.

    Raises:
      UserError: a workdir holds no run or a damaged file; `out` is something else.
    """
    if out.is_dir() or (out.is_file() and not _is_report(out)):
        raise UserError(f"{out}: exists and is no report; name another --out or remove it")
    runs = [gather.gather(workdir) for workdir in workdirs]
    write_text(out, render(runs[0]) if len(runs) == 1 else render_comparison(runs))


def _is_report(file: Path) -> bool:
    with file.open("rb") as content:
        return _GENERATOR.encode() in content.read(1000)


def render(run: Run) -> str:
    """The page of one run."""
    first, further = curves.of_run(run)
    given, defaults = configs.as_json(run.config), configs.as_json(configs.defaults())
    every = _settings(given, defaults)
    differ = [(key, value) for key, value, default in every if value != default]
    changes = gather.changes(run)
    name = gather.names([run.workdir])[0]
    return _page(
        "run.html",
        title=f"Fine-tuning report: {name}",
        run=run,
        summary=gather.summary(run),
        better=None if run.evaluation else next((change.better for change in changes), None),
        unkept=run.standing.better_unkept(),
        best=run.standing.best(),
        evaluate=f"python -m ftjax.evaluate --workdir {shlex.quote(str(run.workdir))}",
        charts=first,
        further=further,
        samples=[(samples, groups(samples.samples)) for samples in run.samples],
        last_general=[change for change in changes if change.name.startswith(gather.GENERAL)],
        cost=cost(run),
        sources=[
            (what, _setting(entry))
            for which, what in (("train", "training"), ("eval", "evaluation"))
            for entry in configs.sources(run.config, which)
        ],
        settings=[(key, _setting(value) + ", chosen by the run" * (key in run.chosen)) for key, value in differ],
        everything=[(key, _setting(value)) for key, value, _ in every],
        versions=_versions(run.starts),
        about=run.starts[-1].get("run", {}) if run.starts else {},
        data=run.starts[-1].get("data", {}) if run.starts else {},
    )


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    names = gather.names([run.workdir for run in runs])
    first, further = curves.of_runs(runs, names)
    flat = [{key: value for key, value, _ in _settings(configs.as_json(run.config), {})} for run in runs]
    keys = [key for key in flat[0] if len({str(values.get(key)) for values in flat}) > 1]
    changes = [{change.name: change for change in gather.changes(run)} for run in runs]
    metrics = list(dict.fromkeys(name for found in changes for name in found if not curves.is_category(name)))
    costs = [dict(cost(run)) for run in runs]
    return _page(
        "comparison.html",
        title=f"Comparison of {len(runs)} fine-tuning runs",
        runs=list(zip(names, runs)),
        names=names,
        verdicts=[gather.summary(run)[0] for run in runs],
        verdict=_which_is_best(names, changes, metrics),
        metrics=[(name, [found.get(name) for found in changes]) for name in metrics],
        evaluated=_evaluated(runs),
        keys=[(key, [_setting(values.get(key, "")) for values in flat]) for key in keys],
        costs=[(what, [spent.get(what, "") for spent in costs]) for what in dict.fromkeys(itertools.chain(*costs))],
        charts=first,
        further=further,
        samples=_together(runs),
    )


def groups(samples: Sequence[Sample]) -> list[Group]:
    """Samples by what training changed, no more than MAX_SAMPLES in all, and of each outcome some."""
    outcomes: dict[str, list[Sample]] = {"Changed for the worse": [], "Changed for the better": [], "Unchanged": []}
    for sample in samples:
        before, after = sample.score_before, sample.score_after
        if after is None:
            title = "Without a score"
        elif before is None:
            title = "Not measured before"
        else:
            title = "Unchanged" if before == after else f"Changed for the {'better' if after > before else 'worse'}"
        outcomes.setdefault(title, []).append(sample)
    found = {title: members for title, members in outcomes.items() if members}
    room = {title: min(len(members), MAX_SAMPLES // len(found)) for title, members in found.items()}
    for title, members in found.items():  # what others leave of the room
        room[title] += min(len(members) - room[title], MAX_SAMPLES - sum(room.values()))
    for members in found.values():
        members.sort(key=lambda sample: (_or(sample.score_after, 0.0), -_or(sample.score_before, 0.0)))
    return [Group(title, len(members), members[: room[title]]) for title, members in found.items()]


def cost(run: Run) -> list[tuple[str, str]]:
    """What the run took, as a table."""
    spent = gather.cost(run)
    rows = []
    if run.starts:
        devices = run.starts[-1]["devices"]
        rows.append(("devices", f"{devices['count']} x {devices.get('kind', 'unknown')}"))
        if devices.get("processes", 1) > 1:
            rows.append(("processes", str(devices["processes"])))
    if spent.device_seconds is not None:
        starts = f", over {len(run.starts)} starts" if len(run.starts) > 1 else ""
        rows.append(("device-hours", f"{hours(spent.device_seconds)}, from start to end{starts}"))
    if spent.step_seconds is not None:
        count = run.starts[-1]["devices"]["count"] if run.starts else None
        device_hours = f", {hours(spent.step_seconds * count)} device-hours" if count else " on all devices together"
        rows.append(("training steps alone", f"about {hours(spent.step_seconds)} hours{device_hours}"))
    tokens = max((record["num_tokens"] for record in run.records if "num_tokens" in record), default=None)
    if tokens:
        rows.append(("tokens trained on", figure(tokens)))
        if spent.step_seconds:
            rows.append(("tokens per second", figure(tokens / spent.step_seconds)))
    return rows


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}"


def _which_is_best(names: Sequence[str], changes: Sequence[dict[str, gather.Change]], metrics: Sequence[str]) -> str:
    shared = [name for name in metrics if all(name in found and found[name].mode for found in changes)]
    if not shared:
        return "No evaluation metric is in all of these runs, so none of them can be called the best."
    name = shared[0]
    values = [found[name] for found in changes]
    pick = {"min": min, "max": max}[values[0].mode]
    best = pick(values, key=lambda change: change.after)
    winners = [run for run, change in zip(names, values) if change.after == best.after]
    if len(winners) == len(names):
        return f"All are alike by {name}: {best.shown(best.after)}."
    verb = "is" if len(winners) == 1 else "are"
    return f"{' and '.join(winners)} {verb} best by {name}: {best.shown(best.after)}."


def _evaluated(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, of each run) of what ftjax.evaluate measured: the tuned model, the best prompt, what was forgotten."""
    rows: dict[str, list[str]] = {}

    def note(what: str, number: int, text: str) -> None:
        rows.setdefault(what, [""] * len(runs))[number] = text

    for number, run in enumerate(runs):
        if run.evaluation is None:
            continue
        for scored in run.evaluation.sets:
            known = [one for one in scored.contestants if one.score is not None]
            pick = min if gather.smaller_is_better(scored.metric) else max
            percent = _in_percent(known, scored.metric)
            for what, kinds in (("tuned", ("tuned",)), ("best prompt", _PROMPTS)):
                best = pick((one for one in known if one.kind in kinds), key=lambda one: one.score, default=None)
                if best:
                    ends = gather.interval(best.interval, 100 if percent else 1)
                    text = f"{share(best.score) if percent else figure(best.score)}{ends}"
                    text += f", {best.name}" if what != "tuned" else ""
                    note(f"{scored.name}: {scored.metric}, {what}", number, text)
        forgetting = run.evaluation.forgetting
        if forgetting and forgetting.change is not None:
            text = f"{forgetting.change:+.3g} nats per token{gather.interval(forgetting.interval)}"
            note("cross-entropy of general text, change", number, text)
        if forgetting and forgetting.kl is not None:
            note("KL(base || tuned)", number, f"{figure(forgetting.kl)} nats per token")
    return list(rows.items())


def _together(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str | None, list[Sample]]], int]]:
    """(set, [(prompt, expected, the sample of each run)], how many) of prompts in all runs; most disagreement first."""
    found = []
    for name in (samples.name for samples in runs[0].samples):
        by_run = []
        for run in runs:
            of_set: Samples | None = next((samples for samples in run.samples if samples.name == name), None)
            by_run.append({sample.prompt: sample for sample in of_set.samples} if of_set else {})
        prompts = [prompt for prompt in by_run[0] if all(prompt in samples for samples in by_run)]

        def spread(prompt: str, by_run=by_run) -> float:
            scores = [_or(samples[prompt].score_after, 0.0) for samples in by_run]
            return min(scores) - max(scores)

        prompts.sort(key=spread)
        shown = [(prompt, by_run[0][prompt].expected, [samples[prompt] for samples in by_run]) for prompt in prompts]
        if prompts:
            found.append((name, shown[:MAX_SAMPLES], len(prompts)))
    return found


def _settings(config: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value, default) of each leaf."""
    found = []
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, dict):
            found += _settings(value, default if isinstance(default, dict) else {}, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value, default))
    return found


def _versions(starts: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, str]]]:
    """(step, versions) of each start that had others than the one before it."""
    found: list[tuple[int, dict[str, str]]] = []
    for start in starts:
        versions = start.get("versions") or {}
        if not found or found[-1][1] != versions:
            found.append((start.get("step", 0), versions))
    return found


def _setting(value: Any) -> str:
    """A value of a config as a person reads it."""
    if isinstance(value, dict):
        others = "".join(f", {key} {_setting(value[key])}" for key in value if key != "source")
        return f"{value.get('source', '')}{others}".removeprefix(", ")
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value)) or "none"
    return {True: "yes", False: "no", "": "none"}.get(value, str(value)) if type(value) in (bool, str) else str(value)


def _page(template: str, **values: Any) -> str:
    style, script = (_resource(name) for name in ("style.css", "filter.js"))
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"figure": figure, "share": share, "hours": hours, "signed": lambda value: f"{value:+.3g}"}
    environment.globals |= {
        "svg": lambda chart: Markup(charts.svg(chart)),
        "rows_of": charts.table,
        "summary": charts.summary,
        "whisker": lambda *args: Markup(charts.whisker(*args)),
        "compared": _compared,
        "interval": gather.interval,
        "percent": _in_percent,
        "top": _top,
        "cut": _cut,
        "open": OPEN_SAMPLES,
        "generator": Markup(_GENERATOR),
        "style": Markup(style),
        "script": Markup(script),
        "policy": policy,
        "now": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    text = environment.get_template(template).render(values)
    return spelled(text)


def _compared(before: str | None, after: str | None, tag: str = "ins") -> tuple[Markup, Markup]:
    """Both texts, with what differs marked: as deleted in the one, by `tag` in the other. Not where all of it does."""
    if before is None or after is None:
        return escape(_cut(before or "")), escape(_cut(after or ""))
    old, new = differences(_cut(before), _cut(after))
    if all(differs for _, differs in (*old, *new)):
        return escape(_cut(before)), escape(_cut(after))
    return _marked(old, "del"), _marked(new, tag)


def _marked(pieces: Pieces, tag: str) -> Markup:
    def parts() -> Iterator[Markup]:
        for text, differs in pieces:
            yield Markup(f"<{tag}>%s</{tag}>") % text if differs else escape(text)

    return Markup("").join(parts())


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} ... ({len(text) - MAX_CHARACTERS:,} more characters)"


def _in_percent(contestants: Sequence[Contestant], metric: str) -> bool:
    values = [one.score for one in contestants if one.score is not None]
    return gather.shows_share("min" if gather.smaller_is_better(metric) else "max", values)


def _top(contestants: Sequence[Contestant]) -> float:
    """Where the bars of a table end."""
    return max((value for one in contestants for value in (one.score or 0.0, *(one.interval or ()))), default=1.0)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _resource(name: str) -> str:
    return resources.files("ftjax.reporting").joinpath(name).read_text(encoding="utf-8")
