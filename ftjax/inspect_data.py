"""What a run would be trained on: its rows seen, counted and checked before any weight is read.

    python -m ftjax.inspect_data --config configs/chat.py --config.model.source=M --config.data.train=rows.jsonl
    python -m ftjax.inspect_data --config C --rows 5               five rows, token by token
    python -m ftjax.inspect_data --config C --rows 5 --source 1    of the second source of data.train
    python -m ftjax.inspect_data --config C --html PAGE.html       one page to search and filter the rows in a browser
    python -m ftjax.inspect_data --config C --json FILE            the figures and findings for another program
    python -m ftjax.inspect_data --config C --workdir runs/X       with the time an epoch takes, from that run's speed

It takes the config of the training and any --config.key=value that training takes, reads the tokenizer (no weights),
and prints the sources and their shares, lengths, truncation, duplicates, how full the packed rows are, steps and time;
then the rows asked for: trained tokens are green (in a pipe: between [[ and ]]), "|" separates tokens, special tokens
are shown by name, BOS and EOS marked. After those of data.train the same is said of data.ptx, where that has any. Last
comes the verdict: errors and warnings, each with its code, where it is (file:line) and what to do.

Exit status: 0 no errors (there may be warnings), 2 errors, or a mistake in the config or flags. Training makes the same
checks, except for near duplicates, and does not start on errors; config.data.checks=warn only prints them.
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress

from ftjax import assemble, choices, cli, config_flag, preflight, sharding
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.atomic import write_text
from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR, Findings
from ftjax.data.pipeline import DataSpec, check_shared, read_heldout, training_rows
from ftjax.data.read.rows import Rows
from ftjax.data.tokens.outcome import outcome
from ftjax.errors import UserError
from ftjax.evals.entries import split_entries
from ftjax.inspection import page, terminal
from ftjax.inspection.pieces import Piece, pieces
from ftjax.inspection.survey import Epoch, Survey, epoch_of, examples_in_epoch, survey
from ftjax.method import iterations, method_of
from ftjax.objectives.unpaired import imbalance
from ftjax.sources import ptx_spec
from ftjax.training import metrics

_PAGE_ROWS = 1500


def inspect(config: ConfigDict, options: dict) -> int:
    """Surveys the data of a config and shows it; returns the exit status. options: the flags by name."""
    configs.validate(config)
    # Nothing is multiplied here, where there may be no oneDNN.
    config = choices.by_devices(configs.changed(config, {"model.matmul": "xla"}), "cpu")
    base = assemble.open_base(config.model, config.data, weights=False)
    spec = assemble.data_spec(config, base.model.spec, images=base.images)
    speed = speed_of(options["tokens_per_second"], options["workdir"])
    train = training_rows(configs.sources(config, "train"), spec)
    entries, by_loss = split_entries(config)
    heldout = read_heldout([*entries, *by_loss], configs.sources(config, "train"), spec)
    out = terminal.console()
    result = _surveyed(train, heldout, base, spec, options["max_rows"], out)
    mesh = AbstractMesh(tuple(max(config.mesh[axis], 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    preflight.check_sharing(config, base.model.spec, mesh)
    asked, examples = config, examples_in_epoch(result)
    if len(result.cut):
        check_shared(result.tokens - int(result.cut.sum()), spec)
        config = choices.by_data(config, base.model.spec, mesh, result.cut, examples, result.prefix)
        spec = assemble.data_spec(config, base.model.spec, images=base.images)
    epoch = epoch_of(result, spec, config.steps, config.epochs)
    few = choices.few_updates(config, asked, base.model.spec, mesh, epoch.rows, examples, epoch.steps)
    warnings = Findings()
    if epoch.rows and few:
        warnings.add("few", what=few)
    if epoch.rows and "desirable_weight" in method_of(config).settings:
        good = examples_in_epoch(result, "good")
        if unbalanced := imbalance(config.objective, good, examples - good):
            warnings.add("unbalanced", what=unbalanced)
    result.findings.extend(warnings.all())
    terminal.summary(out, result, epoch, spec, speed)
    shown, codes = functools.partial(_shown, train, base, spec), _codes(result)
    for index in indices_to_show(train, options["source"], options["rows"]):
        if row := shown(index):
            terminal.row(out, *row, codes.get(index, []))
    figures = report(result, epoch) | {"chosen": _chosen(config, base)}
    if config.data.ptx and epoch.rows:
        steps = config.steps or epoch.steps * iterations(config)
        figures["ptx"] = _inspect_ptx(config, base, heldout, steps, options, out, result)
    terminal.findings(out, result, config.data.checks)
    if options["html"]:
        rows = page_rows(train, codes, shown)
        write_text(Path(options["html"]), page.render(result, epoch, spec, rows, config.data.checks))
        only = ", with the rows of config.data.train" if config.data.ptx else ""
        out.print(f"the page is {options['html']}{only}", markup=False)
    if options["json"]:
        write_text(Path(options["json"]), json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return cli.EXIT_MISTAKE if result.failed() else 0


def _inspect_ptx(
    config: ConfigDict, base: Base, heldout: Sequence[Rows], steps: int, options: dict, out: Console, result: Survey
) -> dict:
    """Shows the rows of data.ptx as those of data.train; returns their report. Adds what is found to `result`."""
    spec = ptx_spec(config, assemble.data_spec(config, base.model.spec, images=base.images))
    rows = training_rows(configs.sources(config, "ptx"), spec)
    found = _surveyed(rows, heldout, base, spec, options["max_rows"], out)
    epoch = epoch_of(found, spec, steps, 0.0)
    out.print(f"config.data.ptx, of which each step has {spec.batch_size} rows beside the completions", style="bold")
    terminal.summary(out, found, epoch, spec, speed_of(options["tokens_per_second"], options["workdir"]))
    codes = _codes(found)
    for index in indices_to_show(rows, None, options["rows"]) if options["source"] is None else ():
        if row := _shown(rows, base, spec, index):
            terminal.row(out, *row, codes.get(index, []))
    result.findings.extend(finding for finding in found.findings if finding not in result.findings)
    result.findings.sort(key=lambda finding: finding.severity != ERROR)
    return report(found, epoch)


def _surveyed(rows: Rows, heldout: Sequence[Rows], base: Base, spec: DataSpec, max_rows: int, out: Console) -> Survey:
    with Progress(console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task("reading and tokenizing", total=min(len(rows), max_rows or len(rows)))
        tokens = base.tokenizer, base.end_tokens
        return survey(
            *(rows, heldout, *tokens, spec, max_rows),
            lambda done: bar.update(task, completed=done),
            base.known_rows,
        )


def _codes(found: Survey) -> dict[int, list[str]]:
    """{index of a row: the codes of what was found of it}."""
    codes: dict[int, list[str]] = {}
    for code, indices in found.marked.items():
        for index in indices:
            codes.setdefault(index, []).append(code)
    return codes


def _shown(rows: Rows, base: Base, spec: DataSpec, index: int) -> tuple[str, list[tuple[str, list[Piece]]]] | None:
    """The origin of a row and its named examples in pieces; None where it is not trained on."""
    found = outcome(rows, index, base.tokenizer, spec.rules)
    if found is None or found.bad or not found.parts:
        return None  # reported among the findings
    named = [
        (name or (f"answer {number}" if found.split else ""), document)
        for number, documents in enumerate(found.parts, 1)
        for name, document in documents.items()
    ]
    return found.row.origin, [
        (name, pieces(document.tokens, document.trained, base.tokenizer)) for name, document in named
    ]


def speed_of(tokens_per_second: float, workdir: str | None) -> tuple[float, str] | None:
    """Tokens per second and where the figure is from: the flag, or the median of a run's own steps."""
    if tokens_per_second:
        return tokens_per_second, "--tokens_per_second"
    if not workdir:
        return None
    path = Path(workdir) / "metrics.jsonl"
    speeds = [record["tokens_per_second"] for record in metrics.read(path) if "tokens_per_second" in record]
    if not speeds:
        raise UserError(f"{path}: no tokens_per_second there; give the workdir of a run that made a few steps")
    return statistics.median(speeds), f"the median of {len(speeds)} steps of {workdir}"


def indices_to_show(train: Rows, source: int | None, count: int) -> list[int]:
    """Indices of `count` rows to show, evenly spread over all or over one source."""
    if source is None:
        return checks.spread(len(train), count).tolist() if count else []
    counts = [source_rows for _, source_rows in train.per_source]
    if not 0 <= source < len(counts):
        raise UserError(f"--source {source}: config.data.train has the sources 0 to {len(counts) - 1}")
    return (sum(counts[:source]) + checks.spread(counts[source], count or 1)).tolist()


def page_rows(train: Rows, codes: dict[int, list[str]], shown) -> list[page.PageRow]:
    """Rows for the page: those with findings (the first of each kind), and others evenly spread."""
    rows = []
    for index in sorted({*codes, *checks.spread(len(train), _PAGE_ROWS).tolist()}):
        if row := shown(index):
            origin, examples = row
            rows.append(page.PageRow(origin, train.source_of(index), codes.get(index, []), examples))
    return rows


def report(result: Survey, epoch: Epoch) -> dict:
    """The survey as plain JSON: figures, sources and findings."""
    names = ("rows", "looked_at", "heldout", "used", "dropped", "truncated", "divided", "refused")
    return {
        **{name: getattr(result, name) for name in (*names, "copies", "near_copies", "tokens", "trained")},
        "sources": [dataclasses.asdict(source) for source in result.sources],
        "epoch": dataclasses.asdict(epoch),
        "findings": [dataclasses.asdict(finding) for finding in result.findings],
    }


def _chosen(config: ConfigDict, base: Base) -> dict:
    """What a run would begin with of what a config leaves open, on devices as config.mesh has them."""
    config = choices.by_model(config, base.model.spec)
    data = config.data
    sizes = {"batch_size": data.batch_size, "row_length": data.row_length, "epochs": config.epochs}
    return {**sizes, "learning_rate": config.optimizer.learning_rate}


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    options = {name: getattr(FLAGS, name) for name in _OPTIONS}
    return inspect(config_flag.value(), options)


if __name__ == "__main__":
    sys.argv[0] = "ftjax.inspect_data"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    config_flag.define()
    flags.DEFINE_integer("rows", 2, "rows to show token by token", lower_bound=0)
    flags.DEFINE_integer("source", None, "show rows of this entry of config.data.train only (from 0)")
    flags.DEFINE_integer("max_rows", 20_000, "rows to look at, evenly spread over the set; 0: all", lower_bound=0)
    flags.DEFINE_float("tokens_per_second", 0.0, "to estimate the time with", lower_bound=0.0)
    flags.DEFINE_string("workdir", None, "a run whose tokens_per_second is used to estimate the time")
    flags.DEFINE_string("html", None, "write a page to browse the rows in")
    flags.DEFINE_string("json", None, "write figures and findings as JSON")
    _OPTIONS = ("rows", "source", "max_rows", "tokens_per_second", "workdir", "html", "json")
    cli.run(main, config_flag.parse)
