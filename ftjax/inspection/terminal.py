"""A survey in the terminal: tables, a histogram, rows with their tokens; readable without color, too."""

import datetime
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftjax.data.audit.findings import ERROR, STOPPING
from ftjax.data.pipeline import DataSpec
from ftjax.inspection.pieces import Piece, plain, visible
from ftjax.inspection.survey import Epoch, Survey, shares

_BAR = 40  # characters
_STYLES = {True: "black on green", False: "default"}  # of trained and other tokens

Speed = tuple[float, str]  # tokens per second, and where the figure is from


def console(file: TextIO | None = None) -> Console:
    """On standard output, or on `file`; 120 characters wide where there is no terminal."""
    out = Console(file=file, highlight=False)
    if not out.is_terminal:
        out.width = 120
    return out


def summary(out: Console, survey: Survey, epoch: Epoch, spec: DataSpec, speed: Speed | None) -> None:
    """Prints the sources, the facts and the histogram of lengths."""
    if survey.picked < survey.rows:
        out.print(f"Looked at {survey.picked:,} of {survey.rows:,} rows, evenly spread; --max_rows=0 looks at all.")
    table = Table(box=None, padding=(0, 2), title="sources", title_justify="left", title_style="bold")
    for name in ("", "rows", "weight", "of an epoch", "used", "tokens", "trained"):
        table.add_column(name, justify="left" if not name else "right")
    for source, share in zip(survey.sources, shares(survey.sources)):
        trained = f"{source.trained / max(1, source.tokens):.1%}"
        numbers = (f"{source.rows:,}", f"{source.weight:g}", f"{share:.1%}", f"{source.used:,}", f"{source.tokens:,}")
        table.add_row(Text(source.name), *numbers, trained)
    out.print(table)
    out.print()
    for name, text in facts_of(survey, epoch, spec, speed).items():
        out.print(Text(f"{name:<20}", "bold") + Text(text), soft_wrap=True)
    out.print()
    out.print(Text("tokens of an example, before it is cut", "bold"))
    for low, high, count, longest in histogram(survey.lengths):
        bar = "█" * round(_BAR * count / longest) or ("▏" if count else "")
        cut = "  <- max_length" if low <= spec.max_length < high else ""
        out.print(f"{low:>7,} - {high - 1:<7,} {bar:<{_BAR}} {count:,}{cut}", markup=False)
    out.print()


def histogram(lengths: np.ndarray, bins: int = 14) -> list[tuple[int, int, int, int]]:
    """(from, to, count, largest count of any bin) for each bin, of equal widths.

    A few very long rows do not squeeze the others: the last bin holds all beyond twice the 95th percentile.
    """
    if not len(lengths):
        return []
    top = min(int(lengths.max()), 2 * int(np.percentile(lengths, 95)))
    width = max(1, -(-(top + 1) // bins))
    edges = np.arange(0, top + width + 1, width)
    counts = np.histogram(np.minimum(lengths, edges[-1] - 1), edges)[0].tolist()
    stops = [*edges[1:-1].tolist(), max(int(edges[-1]), int(lengths.max()) + 1)]
    filled = [(int(low), stop, count, max(counts)) for low, stop, count in zip(edges, stops, counts)]
    first = next(i for i, count in enumerate(counts) if count)
    return filled[max(0, first - 1) :]  # the empty bins before the shortest length but one are left out


def facts_of(survey: Survey, epoch: Epoch, spec: DataSpec, speed: Speed | None) -> dict[str, str]:
    """{name of a figure: the figure in words}."""
    looked_at = max(1, survey.looked_at)
    split = f" (each answer of {survey.split:,} rows is one)" if survey.split else ""
    divided = f"; {survey.divided:,} long texts go on in further documents" if survey.divided else ""
    facts = {
        "rows": f"{survey.picked:,} looked at, {survey.looked_at:,} of them to train on, which give {survey.used:,} "
        f"examples{split}; {survey.refused:,} refused, {survey.dropped:,} without a trained token",
        "evaluation rows": f"{survey.heldout:,}",
        "duplicates": f"{survey.copies:,} exact ({survey.copies / looked_at:.1%}), {survey.near_copies:,} near "
        f"({survey.near_copies / looked_at:.1%})",
        "truncated": f"{survey.truncated:,} ({survey.truncated / max(1, survey.tokenized):.1%}) at max_length "
        f"{spec.max_length:,}{divided}",
    }
    if not len(survey.cut):
        return facts
    percents = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    quantiles = [f"{name} {np.percentile(survey.lengths, percent):,.0f}" for name, percent in percents.items()]
    packed = f"packed {epoch.efficiency:.1%} full" if spec.packing else f"padded, about {epoch.efficiency:.1%} full"
    facts |= {
        "tokens": "  ".join(quantiles),
        "trained on": f"{survey.trained:,} of {survey.tokens:,} tokens ({survey.trained / survey.tokens:.1%})",
        **({"shared": _shared(survey)} if spec.shares else {}),
        "an epoch": f"{epoch.tokens:,} tokens in {epoch.rows:,} rows of up to {spec.row_length:,}, {packed}",
        "steps": f"{epoch.steps:,} of {spec.batch_size} rows, about {epoch.examples:.0f} examples "
        f"({epoch.epochs:.2f} epochs)",
        "time": "unknown: give --tokens_per_second, or --workdir of a run on the same machine",
    }
    if speed:
        per_epoch = datetime.timedelta(seconds=round(epoch.tokens / speed[0]))
        whole = datetime.timedelta(seconds=round(epoch.tokens * epoch.epochs / speed[0]))
        facts["time"] = (
            f"{per_epoch} an epoch, {whole} for all steps, at {speed[0]:,.0f} tokens/s ({speed[1]}); without "
            "compilation, evaluation and checkpoints"
        )
    return facts


def _shared(survey: Survey) -> str:
    within = survey.tokens - int(survey.cut.sum()) - survey.prefix * len(survey.cut)
    pairs = f", and {within:,} tokens of second answers to a prompt" if within else ""
    return f"{survey.prefix:,} tokens that all begin with, once in each row{pairs}"


def row(out: Console, origin: str, examples: Sequence[tuple[str, list[Piece]]], codes: Sequence[str]) -> None:
    """One row token by token: trained tokens on green, or between [[ and ]] where there is no color."""
    for name, shown in examples:
        count, trained = sum(p.tokens for p in shown), sum(p.tokens for p in shown if p.trained)
        note = f"  {', '.join(codes)}" if codes else ""
        title = f"{origin}{' ' + name if name else ''}: {count} tokens, {trained} trained"
        out.print(Text(title, "bold") + Text(note, "yellow"), soft_wrap=True)
        if not out.is_terminal or out.no_color:
            out.print(plain(shown), markup=False, soft_wrap=True)
        else:
            text = Text()
            for i, piece in enumerate(shown):
                text.append("|" if i and shown[i - 1].trained == piece.trained else "", "dim")
                text.append(visible(piece), _STYLES[piece.trained] + (" bold underline" if piece.special else ""))
            out.print(text, soft_wrap=True)
        out.print()


def findings(out: Console, survey: Survey, checks: str) -> None:
    """Prints all findings, then the verdict. checks: config.data.checks."""
    for finding in survey.findings:
        style = "bold red" if finding.severity == ERROR else "yellow"
        out.print(Text(f"{finding.severity}: ", style) + Text(f"{finding.message} [{finding.code}]"), soft_wrap=True)
    out.print(verdict(survey, checks), markup=False)


def verdict(survey: Survey, checks: str) -> str:
    """Whether training would start, as a sentence without its period. checks: config.data.checks."""
    errors = [finding for finding in survey.findings if finding.severity == ERROR]
    warnings = _count(len(survey.findings) - len(errors), "warning")
    if errors:
        stops = checks == "on" or any(finding.code in STOPPING for finding in errors)
        what = "stop before its first step" if stops else f"start all the same, as config.data.checks is {checks!r}"
        return f"{_count(len(errors), 'error')} and {warnings}: training would {what}"
    if survey.findings:
        return f"no errors, {warnings}: training can start; look at them first"
    return "no errors and no warnings: training can start"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
