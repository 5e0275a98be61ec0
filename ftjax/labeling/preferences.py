"""What labels come to: rows of preferences that `data.train` reads, and how many judgements gave none."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ftjax.atomic import write_rows
from ftjax.labeling.agreement import Agreement, agreement
from ftjax.labeling.candidates import short
from ftjax.labeling.journal import Label, Labels
from ftjax.labeling.pairs import Pair

FILE = "preferences.jsonl"


class Outcome(NamedTuple):
    """Of the pairs that somebody judged.

    Attributes:
      labelers: {name: judgements}, skips included.
      preferred, ties, undecided, skipped: pairs by what most said of them; undecided: as many said something else.
      disagreed: pairs on which not all who judged them said the same.
    """

    labelers: dict[str, int]
    preferred: int
    ties: int
    undecided: int
    skipped: int
    disagreed: int
    agreement: Agreement | None


def verdict(labels: Mapping[str, Label]) -> str:
    """What most labelers say of a pair: "a", "b" or "tie"; "undecided" where two are said as often, "skip" by all."""
    votes = collections.Counter(label.choice for label in labels.values() if label.choice != "skip")
    if not votes:
        return "skip"
    (first, count), *others = votes.most_common()
    return "undecided" if others and others[0][1] == count else first


def export(out: Path, pairs: Sequence[Pair], labels: Labels) -> Outcome:
    """Writes preferences.jsonl into `out`, a row for each pair with a preferred answer, in the order of `pairs`.

    Without any such pair there is no file afterwards: training refuses an empty one.
    """
    verdicts = {pair.id: verdict(labels[pair.id]) for pair in pairs if labels.get(pair.id)}
    rows = [_row(pair, verdicts[pair.id]) for pair in pairs if verdicts.get(pair.id) in ("a", "b")]
    if rows:
        write_rows(out / FILE, rows)
    else:
        (out / FILE).unlink(missing_ok=True)
    counts = collections.Counter(verdicts.values())
    said = [{label.choice for label in labels[pair].values()} - {"skip"} for pair in verdicts]
    labelers = collections.Counter(label.labeler for by in labels.values() for label in by.values())
    return Outcome(
        labelers=dict(sorted(labelers.items())),
        preferred=len(rows),
        ties=counts["tie"],
        undecided=counts["undecided"],
        skipped=counts["skip"],
        disagreed=sum(len(choices) > 1 for choices in said),
        agreement=agreement(labels),
    )


def told(outcome: Outcome, out: Path) -> list[str]:
    """The outcome in sentences."""
    if not outcome.labelers:
        return ["Nothing is judged yet."]
    by = ", ".join(f"{name} ({count:,})" for name, count in outcome.labelers.items())
    pairs = outcome.preferred + outcome.ties + outcome.undecided + outcome.skipped
    lines = [f"{_count(pairs, 'pair')} judged by {by}."]
    if outcome.preferred:
        lines.append(f"{_count(outcome.preferred, 'preference')} in {out / FILE}: data.train reads it.")
    left = {"tied": outcome.ties, "undecided": outcome.undecided, "skipped": outcome.skipped}
    if any(left.values()):
        lines.append("Left out: " + ", ".join(f"{count:,} {what}" for what, count in left.items() if count) + ".")
    if found := outcome.agreement:
        beyond = f"{found.name} {found.value:.2f}" if found.value is not None else "all the same"
        several = f"{_count(found.pairs, 'pair')} judged by several: {found.share:.0%} agreement ({beyond})"
        lines.append(f"{several}, {outcome.disagreed:,} disagreed on.")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _row(pair: Pair, better: str) -> dict:
    chosen, rejected = (pair.a, pair.b) if better == "a" else (pair.b, pair.a)
    tools = {"tools": pair.tools} if pair.tools else {}
    return {"prompt": short(pair.prompt), "chosen": short(chosen), "rejected": short(rejected), **tools}
