"""Runs of one config with other settings each, one after another on this machine, and which of them is best.

    python -m ftjax.sweep --config C --sweep "optimizer.learning_rate=1e-4,3e-4; adapter.rank=8,16" --workdir runs/sweep
    python -m ftjax.sweep --config C --sweep settings.yaml --workdir runs/sweep

--sweep is a grid, KEY=VALUE,VALUE;KEY=..., or a YAML file: of a mapping from keys to lists, a grid too, or of a list of
mappings from keys to values, a run each. --config.KEY=VALUE holds for all of them. Each is an ordinary run in
WORKDIR/NAME, so the same command again leaves those that are finished and goes on with the others; one that fails does
not stop those after it. --dry_run prints the commands instead; --index runs one of them, for job arrays; --report only
compares. Exit status: 0 all finished, 1 some failed, 2 a mistake in what was asked, 75 and 130 stopped, as a run is.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ftjax import cli, config_files, config_flag, preflight
from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.evals.deciding import Deciding
from ftjax.relay import Relay
from ftjax.training import environment, metrics
from ftjax.training.checkpoint import complete_steps

# Runs that differ in these are measured differently, and none of them is the best.
_MEASURES = ("data.eval", "data.holdout", "evaluate.best", "evaluate.max_new_tokens")
_MEASURES += ("evaluate.samples", "evaluate.temperature", "evaluate.general", "evaluate.general_tokens")
_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""


class Run(NamedTuple):
    """One run of a sweep."""

    name: str
    workdir: Path
    settings: Mapping[str, str]  # {dotted key: text of the value, as on a command line}
    arguments: Sequence[str]  # of ftjax.train


class Result(NamedTuple):
    """How a run of a sweep came out."""

    run: Run
    status: int | None  # its exit status; None: it was not started by this command
    step: int | None = None  # the best checkpoint's
    value: float | None = None  # what decides, there
    mark: str | None = None  # the digest of the evaluation set
    left: str = ""  # how far an unfinished run has come


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if not _SWEEP.value:
        raise UserError("--sweep is missing; such as --sweep 'optimizer.learning_rate=1e-4,3e-4', or a YAML file")
    if sum([_DRY_RUN.value, _INDEX.value is not None, _REPORT.value]) > 1:
        raise UserError("--dry_run, --index and --report exclude each other; give one of them")
    config, common = config_flag.value(), config_flag.overrides()
    where = Path(_WORKDIR.value or f"runs/{config_flag.name()}-sweep")
    runs = planned(read(_SWEEP.value), where, flags.FLAGS.config, common)
    decides = best.decides(config)
    if _DRY_RUN.value:
        for run in runs:
            print(shlex.join(["python", "-m", "ftjax.train", *run.arguments]))
        return 0
    if _INDEX.value is not None:
        if not 0 <= _INDEX.value < len(runs):
            raise UserError(f"--index {_INDEX.value}: there are {len(runs)} runs, 0 to {len(runs) - 1}")
        sys.stdout.flush()
        command = [sys.executable, "-m", "ftjax.train", *runs[_INDEX.value].arguments]
        os.execv(command[0], command)  # signals, the exit status and several processes are then those of a run
    statuses, stopped = {}, 0
    if not _REPORT.value:
        statuses, stopped = run_all(runs)
    report(where, decides, [result(run, statuses.get(run.name)) for run in runs])
    return stopped or int(any(statuses.values()))


# What is run


def read(text: str) -> list[dict[str, str]]:
    """The settings of each run, {dotted key: text of the value}, that --sweep asks for: a grid, or a file."""
    if text.endswith((".yaml", ".yml", ".json")) and "=" not in text:
        return _of_file(Path(text))
    values: dict[str, list[str]] = {}
    for part in filter(None, _split(text, ";")):
        key, sign, listed = part.partition("=")
        if not sign or key.strip() in values:
            raise UserError(f"--sweep {text!r}: {part!r} must be KEY=VALUE,VALUE,..., each key once")
        values[key.strip()] = _split(listed, ",")
    return _grid(values)


def _of_file(path: Path) -> list[dict[str, str]]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--sweep {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {path}: no YAML ({error})") from error
    if isinstance(given, dict) and all(isinstance(values, list) for values in given.values()):
        return _grid({key: [config_flag.text_of(value) for value in values] for key, values in given.items()})
    if isinstance(given, list) and all(isinstance(settings, dict) for settings in given):
        return [{key: config_flag.text_of(value) for key, value in settings.items()} for settings in given]
    raise UserError(f"--sweep {path}: must be a mapping from keys to lists, or a list of mappings from keys to values")


def _grid(values: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def _split(text: str, sign: str) -> list[str]:
    """The parts of `text` between signs that are neither in brackets nor in quotes, without blanks around them."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        depth += 0 if quote else (letter in _OPEN) - (letter in _CLOSE)
        if letter == sign and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def planned(
    settings: Sequence[Mapping[str, str]], where: Path, config: str, common: Sequence[tuple[str, str]]
) -> list[Run]:
    """The runs, each with its name and command line.

    config: as --config names it; common: what --config.KEY=VALUE sets for all.

    Raises:
      UserError: a run's config is not valid, a key is given twice, or runs could not be compared.
    """
    keys = list(dict.fromkeys(key for one in settings for key in one))
    if not keys:
        raise UserError("--sweep names no setting")
    if twice := sorted(set(keys) & {key for key, _ in common}):
        raise UserError(f"--config.{twice[0]} is for all runs, and --sweep changes it; leave one of them out")
    if measures := [key for key in keys if key in _MEASURES]:
        raise UserError(f"--sweep: runs that differ in {measures[0]} are measured differently, and do not compare")
    shared = [f"--config={config}", *(f"--config.{key}={text}" for key, text in common)]
    runs = []
    for one in settings:
        its = config_flag.overridden(config_files.load(config), [*common, *one.items()])
        configs.validate(its)
        preflight.check_evaluation(its)
        judge = best.decides(its)
        changed = [key for key in keys if key.startswith("objective.")]
        if changed and judge and any(name == "eval_loss" for _, name in judge.terms):
            raise UserError(
                f"--sweep: {changed[0]} changes what eval_loss is, which decides; name what does not change with "
                "--config.evaluate.best, such as eval_rewards/accuracies or eval_cross_entropy, or score a source"
            )
        name = _name(one, keys)
        if name in [run.name for run in runs]:
            raise UserError(f"--sweep: {name} stands there twice")
        own = [f"--config.{key}={text}" for key, text in one.items()]
        runs.append(Run(name, where / name, one, [*shared, *own, f"--workdir={where / name}"]))
    return runs


def _name(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    """rank=8,learning_rate=1e-4: a directory's name that says what is different about a run."""
    short = _short(keys)
    letters = (
        "".join(c if c.isalnum() or c in ",=.+-_" else "_" for c in f"{short[k]}={v}") for k, v in settings.items()
    )
    name = ",".join(letters) or "unchanged"
    if len(name) > 150:
        raise UserError(
            f"--sweep: {name[:60]}... is too long for the name of a directory; put long values into configs"
        )
    return name


def _short(keys: Sequence[str]) -> dict[str, str]:
    """{key: its last word, where no other key has the same}."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


# Running them


def run_all(
    runs: Sequence[Run], start: Callable[..., subprocess.Popen] = subprocess.Popen
) -> tuple[dict[str, int], int]:
    """Runs one after another: ({name: exit status} of those that were, the status to end with where it was stopped).

    SIGTERM and Ctrl-C go to the run, which saves; those after it are then left for the next time.
    """
    statuses: dict[str, int] = {}
    with Relay(start) as relay:
        for number, run in enumerate(runs, 1):
            print(f"--- run {number} of {len(runs)}: {run.name}", flush=True)
            statuses[run.name] = status = relay.run(["-m", "ftjax.train", *run.arguments])
            if relay.stopped:
                break
            if status:
                print(f"--- {run.name} failed with status {status}", flush=True)
    return statuses, relay.stopped


# What came of it


def result(run: Run, status: int | None) -> Result:
    """How good the best checkpoint of a run is, which `--step best` takes."""
    if not (run.workdir / "config.json").exists():
        return Result(run, status)
    config = configs.read(run.workdir / "config.json")
    steps = complete_steps(run.workdir / "checkpoints")
    standing = best.Standing.of(config, run.workdir, steps)
    step = standing.best()
    records = metrics.read(run.workdir / "metrics.jsonl")
    measured = best.evaluations(records)
    mark = measured[-1].get(best.SET) if measured else None
    return Result(
        run, status, step, standing.scores.get(step), mark, _left(config, run, records, max(steps, default=0))
    )


def _left(config: ConfigDict, run: Run, records: Sequence[Mapping[str, Any]], last: int) -> str:
    """Such as "step 435 of 6000"; "" of a run that is finished, also early, or too old to say how long it is."""
    starts = environment.read(run.workdir)
    planned = starts[-1]["steps"] if starts else last
    return f"step {last} of {planned}" if last < planned and not best.stalled(config, records) else ""


def report(where: Path, decides: Deciding | None, results: Sequence[Result]) -> None:
    """Prints the runs, the best first, and writes them to sweep.json and sweep.md."""
    sign = -1 if decides and decides.mode == "max" else 1
    ranked = sorted(results, key=lambda one: (one.value is None, sign * (one.value or 0.0)))
    keys = list(dict.fromkeys(key for one in results for key in one.run.settings))
    header = [*_short(keys).values(), decides.text if decides else "nothing is evaluated", "step", "", "run"]
    rows = [
        [
            *(one.run.settings.get(key, "") for key in keys),
            "" if one.value is None else f"{one.value:.4g}",
            "" if one.step is None else str(one.step),
            _said(one),
            one.run.name,
        ]
        for one in ranked
    ]
    workdirs = [str(one.run.workdir) for one in ranked if one.step]
    page = shlex.join([*workdirs, "--out", str(where / "comparison.html")])
    notes = [f"side by side: python -m ftjax.report {page}"] if workdirs else []
    if len({one.mark for one in results if one.mark}) > 1:
        notes.insert(
            0, "the evaluation sets are not the same, for a setting changes rows or tokens: scores do not compare"
        )
    where.mkdir(parents=True, exist_ok=True)
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in (header, *rows)]
    lines.insert(1, "| --- " * len(header) + "|")
    write_text(where / "sweep.md", "\n".join([*lines, "", *notes, ""]))
    record = {"version": 1, "metric": decides and decides.text, "mode": decides and decides.mode}
    record["runs"] = [
        {"name": one.run.name, "workdir": str(one.run.workdir), "settings": dict(one.run.settings)}
        | {"value": one.value, "step": one.step, "status": one.status, "evaluation_set": one.mark}
        for one in ranked
    ]
    write_text(where / "sweep.json", json.dumps(record, indent=2) + "\n")
    _print(header, rows, [*notes, f"this table: {where / 'sweep.md'} and sweep.json"])


def _said(one: Result) -> str:
    if one.status in (cli.EXIT_PREEMPTED, cli.EXIT_INTERRUPTED):
        return "stopped"
    if one.status:
        return f"failed ({one.status})"
    return one.left if (one.run.workdir / "config.json").exists() else "not run"


def _print(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(*(Column(Text(name)) for name in header), box=None, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.sweep"  # absl shows in --help the flags defined under this name
    config_flag.define()
    _SWEEP = flags.DEFINE_string("sweep", None, "KEY=VALUE,VALUE;KEY=... for every combination, or a YAML file")
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the runs are kept (default: runs/NAME-OF-THE-CONFIG-sweep)")
    _DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the command of each run, a line each, and run none")
    _INDEX = flags.DEFINE_integer("index", None, "run only this one, counted from 0; compares nothing")
    _REPORT = flags.DEFINE_bool("report", False, "run none; compare what is there")
    cli.run(main, config_flag.parse)
