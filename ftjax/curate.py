"""Rows of files deduplicated, filtered, split, mixed, converted or sampled, into a new JSONL file.

    python -m ftjax.curate dedup rows.jsonl --out unique.jsonl                   exact copies
    python -m ftjax.curate dedup rows.jsonl --out unique.jsonl --method near     nearly the same, too
    python -m ftjax.curate dedup train.jsonl --against eval.jsonl --out clean.jsonl    copies of evaluation rows, too
    python -m ftjax.curate filter rows.jsonl --out good.jsonl --max_chars 8000 --quality --private
    python -m ftjax.curate split rows.jsonl --out train.jsonl --part eval.jsonl=0.05 --part test.jsonl=0.05
    python -m ftjax.curate mix a.jsonl b.jsonl --weights 3,1 --total 10000 --out mixture.jsonl
    python -m ftjax.curate convert chats.json --to sharegpt --out chats.jsonl
    python -m ftjax.curate sample rows.jsonl --count 20                          to read; --out FILE keeps them

Inputs are files or globs, in every format that training reads (docs/data.md). Rows are written as they stand in their
file, with all their fields. Each command prints how many rows it dropped, why and where; --dropped FILE writes those
rows. An output appears whole or not at all, is never one of the inputs, and replaces a file only with --overwrite.
"""

import argparse
import glob
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ftjax import cli
from ftjax.data.audit import curation, quality
from ftjax.data.audit.curation import Drops, Output
from ftjax.data.format import formats
from ftjax.data.format.example import Row
from ftjax.data.format.images import images_of
from ftjax.data.format.writing import WRITERS, write_as
from ftjax.data.read.rows import Rows
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.kinds import ROW_KINDS, kind_of
from ftjax.errors import UserError, did_you_mean
from ftjax.inspection.terminal import console
from ftjax.weights.source import locate


def dedup(rows: Rows, out: Output, drops: Drops, args: argparse.Namespace) -> None:
    against = _opened(args.against, args) if args.against else None
    unread = curation.dedup(rows, out, drops, args.method == "near", args.threshold, args.by == "prompt", against)
    for count, places in unread.reasons.values():
        where = ", ".join(places)
        print(f"warning: {count:,} rows of --against cannot be read and were not compared: {where}", file=sys.stderr)


def filter_rows(rows: Rows, out: Output, drops: Drops, args: argparse.Namespace) -> None:
    infinity, tests = float("inf"), []
    if args.min_chars or args.max_chars:
        most = args.max_chars or infinity
        tests.append(curation.length_test(args.min_chars, most, "characters", curation.characters))
    if args.min_tokens or args.max_tokens:
        if not args.tokenizer:
            raise UserError("--min_tokens and --max_tokens need --tokenizer, a model whose tokens are counted")
        from ftjax.data.tokens.tokenizer import load  # takes a second, for transformers, and only this needs it

        tokenizer = load(locate(args.tokenizer, weights=False))

        def count(row: Row) -> int:
            if images_of(row.fields):
                raise UserError(
                    f"{row.origin}: has images, whose tokens are not known here; filter by characters instead"
                )
            parts = ROW_KINDS[kind_of(row)].tokenize(row, tokenizer, None, "assistant")
            return max(len(document.tokens) for documents in parts for document in documents.values())

        tests.append(curation.length_test(args.min_tokens, args.max_tokens or infinity, "tokens", count))
    if args.garbled:
        tests.append(curation.garbled_test)
    if args.private:
        tests.append(curation.private_test)
    limits = {name: rule[0] for name, rule in quality.RULES.items()} if args.quality else {}
    limits |= dict(_rule(text) for text in args.rule)
    if limits:
        tests.append(curation.quality_test(limits))
    if not tests:
        raise UserError("filter: name a test: --min_chars, --max_chars, --max_tokens, --quality, --private, --garbled")
    curation.filter_rows(rows, out, drops, tests)


def split(rows: Rows, out: Output, drops: Drops, args: argparse.Namespace) -> None:
    parts = [_part(text) for text in args.part]
    if not parts:
        raise UserError("split: name the other outputs and their shares, such as --part eval.jsonl=0.05")
    if (whole := sum(share for _, share in parts)) >= 1:
        raise UserError(f"split: the shares of --part add up to {whole:g}; leave some for --out, which gets the rest")
    inputs = _inputs(rows)
    with ExitStack() as stack:
        others = [stack.enter_context(Output(path, inputs, args.overwrite)) for path, _ in parts]
        if len({output.path.resolve() for output in (out, *others)}) <= len(parts):
            raise UserError("split: --out and every --part must be different files; rename one")
        curation.split(rows, [out, *others], [share for _, share in parts], drops, args.seed)
        for output in others:
            print(f"{output.path}: {output.count:,} rows")


def mix(rows: Rows, out: Output, drops: Drops, args: argparse.Namespace) -> None:
    try:
        weights = [float(text) for text in args.weights.split(",")]
    except ValueError:
        raise UserError(f"--weights {args.weights}: must be numbers with commas between them") from None
    if len(weights) != len(rows.sources) or min(weights) <= 0:
        raise UserError(f"--weights {args.weights}: must be {len(rows.sources)} positive numbers, one for each input")
    quotas = curation.mix(rows, out, drops, weights, args.total, args.seed)
    for (name, count), quota in zip(rows.per_source, quotas):
        times = f", each {quota / count:.2f} times" if quota > count else f" of {count:,}"
        print(f"{name}: {quota:,} rows{times}")


def convert(rows: Rows, out: Output, drops: Drops, args: argparse.Namespace) -> None:
    for record in curation.records(rows, drops):
        try:
            out.write(write_as(record.row.fields, args.to))
        except UserError as error:
            reason = str(error).removeprefix(record.row.origin).strip(": ")
            drops.add(record.row.origin, f"does not fit {args.to}", reason, record.fields)


def sample(rows: Rows, out: Output | None, drops: Drops, args: argparse.Namespace) -> None:
    for record in curation.sample(rows, args.count, args.seed, drops):
        if out is None:
            sys.stdout.write(curation.as_text(record))
        elif out.path.suffix in (".txt", ".md"):
            out.write_text(curation.as_text(record))
        else:
            out.write(record.fields)


COMMANDS = {"dedup": dedup, "filter": filter_rows, "split": split, "mix": mix, "convert": convert, "sample": sample}


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    rows = _opened(args.inputs, args)
    with ExitStack() as stack:
        inputs = _inputs(rows)
        if not args.out and args.command != "sample":
            raise UserError("give --out, the file to write")
        outputs = [Path(path) for path in (args.out, args.dropped) if path]
        if len({path.resolve() for path in outputs}) < len(outputs):
            raise UserError(f"--dropped {args.dropped}: name another file than --out")
        drops = Drops(stack.enter_context(Output(args.dropped, inputs, args.overwrite)) if args.dropped else None)
        out = stack.enter_context(Output(args.out, inputs, args.overwrite)) if args.out else None
        COMMANDS[args.command](rows, out, drops, args)
        if not out:
            _print_summary(len(rows), None, drops, sys.stderr)
            return 0
        if not out.count:
            _print_summary(len(rows), None, drops, sys.stderr)
            raise UserError(f"{args.out}: no row is left to write; loosen the tests or name other inputs")
    _print_summary(len(rows), out, drops, sys.stdout)
    return 0


def _opened(paths: Sequence[str], args: argparse.Namespace) -> Rows:
    given = {name: value for name in ("format", "columns") if (value := getattr(args, name))}
    return read_sources([{"source": path, **given} for path in paths])


def _inputs(rows: Rows) -> list[Path]:
    """The input files on this machine, which no output may overwrite."""
    paths = []
    for source in rows.sources:
        name = source.name
        if "://" in name:
            import fsspec  # imported already, to open this source
            from fsspec.implementations.local import LocalFileSystem

            system, path = fsspec.core.url_to_fs(name)
            name = path if isinstance(system, LocalFileSystem) else name
        paths += [Path(name), *map(Path, glob.glob(name, recursive=True))]
    return paths


def _print_summary(read: int, out: Output | None, drops: Drops, stream) -> None:
    shown = console(stream)
    if out is not None:
        shown.print(f"{out.path}: {out.count:,} rows; {read:,} read, {drops.total():,} dropped", markup=False)
    if not drops.reasons:
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("dropped", "rows", "for example"):
        table.add_column(name, justify="right" if name == "rows" else "left", overflow="fold")
    for reason, (count, places) in sorted(drops.reasons.items(), key=lambda item: -item[1][0]):
        table.add_row(Text(reason), f"{count:,}", Text(", ".join(places)))
    shown.print(table)


def _rule(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in quality.RULES:
        raise UserError(f"--rule {text}: there is no rule {name!r}{did_you_mean(name, quality.RULES)}")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--rule {text}: give a number, such as {name}={quality.RULES[name][0]:g}") from None


def _part(text: str) -> tuple[Path, float]:
    path, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not path or not 0 < value < 1:
        raise UserError(f"--part {text}: write FILE=SHARE with a share between 0 and 1, such as eval.jsonl=0.05")
    return Path(path), value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m ftjax.curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.add_argument("inputs", nargs="+", metavar="IN", help="files or globs of rows")
        sub.add_argument("--out", type=Path, help="the JSONL file to write (.gz: compressed)")
        sub.add_argument("--dropped", type=Path, help="a JSONL file for the dropped rows, with the reasons")
        sub.add_argument("--overwrite", action="store_true", help="replace output files that exist")
        sub.add_argument("--format", choices=sorted(formats.FORMATS), help="of the inputs (default: by their fields)")
        sub.add_argument("--columns", type=_columns, metavar="OURS=THEIRS,...", help="such as prompt=question")
        return sub

    sub = command("dedup", "Keep the first of rows that are alike.")
    sub.add_argument("--method", choices=("exact", "near"), default="exact", help="alike: in every word, or nearly")
    sub.add_argument("--threshold", type=_share, default=0.8, help="similarity that counts as near (default 0.8)")
    sub.add_argument("--by", choices=("row", "prompt"), default="row", help="compare whole rows, or what they ask")
    sub.add_argument("--against", nargs="+", metavar="FILE", help="also drop what is like a row of these files")

    sub = command("filter", "Keep rows that are long enough, short enough, and in order.")
    sub.add_argument("--min_chars", type=_positive, default=0, help="characters of all turns but system prompts")
    sub.add_argument("--max_chars", type=_positive, default=0)
    sub.add_argument("--min_tokens", type=_positive, default=0, help="tokens, as --tokenizer renders the row")
    sub.add_argument("--max_tokens", type=_positive, default=0)
    sub.add_argument("--tokenizer", metavar="MODEL", help="whose tokens and chat template count")
    sub.add_argument("--quality", action="store_true", help="drop answers that break a rule of quality, as below")
    rules = "; ".join(f"{name} ({kind} {limit:g}): {what}" for name, (limit, kind, what) in quality.RULES.items())
    rules += f". Answers of fewer than {quality.MIN_WORDS} words are not judged."
    sub.add_argument("--rule", action="append", default=[], metavar="NAME=LIMIT", help=f"one rule alone. {rules}")
    sub.add_argument("--private", action="store_true", help="drop rows with what looks like personal data or keys")
    sub.add_argument("--garbled", action="store_true", help="drop rows with text that was decoded wrongly")

    sub = command("split", "Share rows out by a hash of their prompt, so that no prompt is on two sides.")
    sub.add_argument("--part", action="append", default=[], metavar="FILE=SHARE", help="another output and its share")
    sub.add_argument("--seed", type=int, default=0, help="another seed gives another split")

    sub = command("mix", "Put rows of several inputs together in proportion to weights, shuffled.")
    sub.add_argument("--weights", required=True, help="one for each input: 3,1 is three quarters and one quarter")
    sub.add_argument("--total", type=_positive, help="rows to write (default: as many as go without repeating one)")
    sub.add_argument("--seed", type=int, default=0)

    sub = command("convert", "Write rows in another format.")
    sub.add_argument("--to", required=True, choices=sorted(WRITERS))

    sub = command("sample", "Draw rows for reading; without --out they are printed.")
    sub.add_argument("--count", type=_positive, default=10)
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _columns(text: str) -> dict[str, str]:
    named = dict(part.partition("=")[::2] for part in text.split(","))
    if not all((*named, *named.values())):
        raise argparse.ArgumentTypeError(f"{text!r}: write OURS=THEIRS, such as prompt=question,completion=answer")
    return named


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    cli.exit_with(lambda: main(sys.argv[1:]))
