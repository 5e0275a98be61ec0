"""Trainings and evaluations that follow from each other, as one command; the same command goes on.

    python -m ftjax.pipeline rlhf.yaml --workdir runs/rlhf
    python -m ftjax.pipeline rlhf.yaml --workdir runs/rlhf --dry_run     prints the commands, runs none

The file is YAML: stages by their names, in the order in which they run. A stage is a training, with the `config` that
it is of and the keys that it sets, or, with `evaluate`, a comparison by ftjax.evaluate with its flags:

    sft:
      config: chat
      model.source: Qwen/Qwen3-0.6B
      data.train: answers.jsonl
    reward:
      config: chat
      model.source: Qwen/Qwen3-0.6B
      objective.name: reward
      adapter.source: "{sft.peft}"
      data.train: pairs.jsonl
    grpo:
      config: grpo
      model.source: Qwen/Qwen3-0.6B
      adapter.source: "{sft.peft}"
      objective.rewards: ["reward:{reward}"]
      data.train: prompts.jsonl
      data.eval: {source: questions.jsonl, score: f1}
    comparison:
      evaluate: "{grpo}"
      adapter: ["sft={sft.peft}"]

{NAME} stands for the run of an earlier stage, WORKDIR/NAME, and {NAME.peft}, {NAME.merged}, {NAME.hf} for its export in
that format, which is made when it is first needed. Everything is an ordinary run or export, with its own files; what
came of it is in WORKDIR/pipeline.md, and all trainings side by side in WORKDIR/comparison.html. What is finished is not
done again, unless what it is asked for has changed, or what comes before it. Exit status: 0 finished; else that of the
stage that failed, 2 for a mistake, 75 and 130 if it was stopped, as a run is.
"""

import argparse
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ftjax import cli, config_files, config_flag, preflight
from ftjax import config as configs
from ftjax.atomic import write_text
from ftjax.errors import UserError, did_you_mean
from ftjax.evals import best
from ftjax.relay import Relay
from ftjax.reporting import evaluation, page
from ftjax.training import metrics
from ftjax.training.checkpoint import complete_steps

RECORD, TABLE, PAGE = "pipeline.json", "pipeline.md", "comparison.html"  # in the workdir
_FORMATS = ("peft", "merged", "hf")
_NAME = re.compile(r"[A-Za-z][\w-]*")
_PLACE = re.compile(r"\{([A-Za-z][\w-]*(?:\.\w+)?)\}")


class Task(NamedTuple):
    """A command of a pipeline."""

    name: str  # of its stage, or of an export NAME.FORMAT
    arguments: tuple[str, ...]  # of python
    workdir: Path | None = None  # of a training
    export: Path | None = None  # what it makes
    compares: Path | None = None  # the run whose evaluation it writes


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "ftjax.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the stages, in YAML")
    parser.add_argument("--workdir", type=Path, help="where everything is kept (default: runs/NAME-OF-THE-FILE)")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the command of each stage, a line each, and run none"
    )
    args = parser.parse_args(argv)
    where = args.workdir or Path("runs") / args.file.stem
    tasks = planned(read(args.file), where, args.file)
    if args.dry_run:
        for task in tasks:
            print(shlex.join(["python", *task.arguments]))
        return 0
    status = run_all(tasks, where)
    report(tasks, where)
    return status


# What is run


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{stage: its settings}, of the file."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(given, dict) or not given or not all(isinstance(stage, dict) for stage in given.values()):
        raise UserError(f"{path}: must be a mapping from the names of stages to their settings; --help has one")
    for name, stage in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{path}: {name!r} is no name of a stage; use letters, digits, _ and -")
        if ("config" in stage) == ("evaluate" in stage):
            raise UserError(f"{path}: {name} needs `config` (a training), or `evaluate` (a comparison), and not both")
    return given


def planned(stages: Mapping[str, Mapping[str, Any]], where: Path, path: Path) -> list[Task]:
    """The commands in their order, those that export among them. Raises UserError for a mistake in any of them."""
    tasks: list[Task] = []
    for name, stage in stages.items():
        mentioned = dict.fromkeys(_mentioned(stage))
        try:
            _check_mentioned(mentioned, [task.name for task in tasks if task.workdir])
            settings = _placed(stage, where)
            task = _training(name, settings, where) if "config" in settings else _comparison(name, settings)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from error
        have = {task.name for task in tasks}
        tasks += [_export(its, where) for its in mentioned if "." in its and its not in have]
        tasks.append(task)
    return tasks


def _mentioned(value: Any) -> list[str]:
    """The names in braces in a value of YAML, in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [name for part in value for name in _mentioned(part)]
    return _PLACE.findall(value) if isinstance(value, str) else []


def _check_mentioned(names: Iterable[str], trainings: Sequence[str]) -> None:
    """trainings: those that come before."""
    for name in names:
        stage, dot, form = name.partition(".")
        if stage not in trainings:
            hint = did_you_mean(stage, trainings)
            raise UserError(f"{{{name}}}: no training of that name comes before{hint}")
        if dot and form not in _FORMATS:
            raise UserError(f"{{{name}}}: {form!r} is none of {', '.join(_FORMATS)}")


def _placed(value: Any, where: Path) -> Any:
    """The value with paths for the names in braces."""
    if isinstance(value, dict):
        return {key: _placed(part, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_placed(part, where) for part in value]
    return _PLACE.sub(lambda found: str(where / found[1]), value) if isinstance(value, str) else value


def _training(name: str, settings: Mapping[str, Any], where: Path) -> Task:
    config = str(settings["config"])
    pairs = [(key, config_flag.text_of(value)) for key, value in _flat(settings) if key != "config"]
    its = config_flag.overridden(config_files.load(config), pairs)
    configs.validate(its)
    preflight.check_evaluation(its)
    words = [f"--config={config}", *(f"--config.{key}={text}" for key, text in pairs), f"--workdir={where / name}"]
    return Task(name, ("-m", "ftjax.train", *words), where / name)


def _flat(settings: Mapping[str, Any], section: str = "") -> list[tuple[str, Any]]:
    """[(dotted key, value)] of settings that may be nested as a config's are."""
    pairs = []
    for key, value in settings.items():
        is_section = any(name.startswith(f"{section}{key}.") for name in configs.KEYS)
        pairs += (
            _flat(value, f"{section}{key}.") if is_section and isinstance(value, dict) else [(section + key, value)]
        )
    return pairs


def _comparison(name: str, settings: Mapping[str, Any]) -> Task:
    words = [f"--workdir={settings['evaluate']}"]
    for flag, value in settings.items():
        if flag != "evaluate":
            each = value if isinstance(value, list) else [value]
            words += [f"--{flag}={config_flag.text_of(its)}" for its in each]
    return Task(name, ("-m", "ftjax.evaluate", *words), compares=Path(settings["evaluate"]))


def _export(name: str, where: Path) -> Task:
    stage, _, form = name.rpartition(".")
    words = (f"--workdir={where / stage}", f"--format={form}", f"--out={where / name}")
    return Task(name, ("-m", "ftjax.export", *words), export=where / name)


# Running it


def run_all(tasks: Sequence[Task], where: Path, relay: Relay | None = None) -> int:
    """Runs what is not finished, and returns the exit status. relay: for tests."""
    where.mkdir(parents=True, exist_ok=True)
    finished = _finished(where)
    with relay or Relay() as relay:
        for number, task in enumerate(tasks, 1):
            if number <= len(finished) and finished[number - 1]["arguments"] == list(task.arguments):
                continue
            del finished[number - 1 :]  # what follows from it is to be made again
            print(f"--- {number} of {len(tasks)}: {task.name}", flush=True)
            if task.export and task.export.exists():  # of weights as they were, or finished as the command was killed
                shutil.rmtree(task.export)
            began = time.time()
            status = relay.run(task.arguments)
            if status or relay.stopped:
                how = "was stopped; the same command goes on" if relay.stopped else f"failed with status {status}"
                print(f"--- {task.name} {how}", flush=True)
                return relay.stopped or status
            finished.append(
                {"name": task.name, "arguments": list(task.arguments), "seconds": round(time.time() - began)}
            )
            write_text(where / RECORD, json.dumps({"version": 1, "finished": finished}, indent=2) + "\n")
    return 0


def _finished(where: Path) -> list[dict]:
    path = where / RECORD
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["finished"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged; remove it, and what is finished is looked at again") from error


# What came of it


def report(tasks: Sequence[Task], where: Path) -> None:
    """Prints how the stages stand, and writes that and a page that has all runs."""
    seconds = {one["name"]: one["seconds"] for one in _finished(where)}
    lines = ["| stage | | step | what came of it | minutes |", "| --- | --- | --- | --- | --- |"]
    runs = []
    for task in tasks:
        minutes = f"{seconds[task.name] / 60:.1f}" if task.name in seconds else "not finished"
        step, said = ("", "")
        if task.workdir and complete_steps(task.workdir / "checkpoints"):
            runs.append(task.workdir)
            step, said = _outcome(task.workdir)
        if task.compares and (measured := evaluation.read(task.compares / evaluation.FILE)):
            said = measured.verdict
        lines.append(f"| {task.name} | {task.arguments[1].removeprefix('ftjax.')} | {step} | {said} | {minutes} |")
    if runs:
        page.write(runs, where / PAGE)
        lines += ["", f"Side by side: {where / PAGE}"]
    write_text(where / TABLE, "\n".join(lines) + "\n")
    print("\n".join([*lines, f"This table: {where / TABLE}"]))


def _outcome(workdir: Path) -> tuple[str, str]:
    """(the checkpoint that counts, what it was chosen by or the last loss or reward)"""
    config, steps = configs.read(workdir / "config.json"), complete_steps(workdir / "checkpoints")
    decides, standing = best.decides(config), best.Standing.of(config, workdir, steps)
    step = standing.best()
    if decides and step in standing.scores:
        return str(step), f"{decides.text} {standing.scores[step]:.4g}"
    last = [record for record in metrics.read(workdir / "metrics.jsonl") if "loss" in record]
    names = [name for name in ("reward", "loss") if last and name in last[-1]]
    return str(max(steps)), f"{names[0]} {last[-1][names[0]]:.4g}" if names else ""


if __name__ == "__main__":
    cli.exit_with(lambda: main(sys.argv[1:]))
