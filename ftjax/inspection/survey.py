"""One pass over the rows of a run's config: counts, lengths, findings, and what an epoch costs."""

import functools
import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR, Finding
from ftjax.data.audit.kinds import MAX_DROPPED
from ftjax.data.batch import buckets, packing
from ftjax.data.format.example import Example, Row
from ftjax.data.read.rows import Rows
from ftjax.data.read.sources import TASK
from ftjax.data.tokens.chat import NothingTrained
from ftjax.errors import SourceError, UserError
from ftjax.inspection.pieces import examples_of

_CHUNK = 256


@dataclass(frozen=True)
class Settings:
    """The keys of config.data (and a few beside them) that decide what is trained on."""

    max_length: int
    batch_size: int
    packing: bool
    train_on: str
    vocab_size: int
    steps: int
    epochs: float
    max_bad_rows: int = 0
    objective: str = "sft"


@dataclass
class SourceCount:
    """What one source gave.

    Attributes:
      rows: candidates that it has; picked: those of them that were asked for; looked_at: that could be read and are not
        held out; used: examples of them that are trained on.
      tokens, trained: of its examples as they are cut.
    """

    name: str
    weight: float
    rows: int = 0
    picked: int = 0
    looked_at: int = 0
    used: int = 0
    tokens: int = 0
    trained: int = 0


@dataclass
class Survey:
    """What was found.

    Attributes:
      sources: of the training rows, in the order of the config.
      rows: candidates for training; picked, looked_at, used: as of the sources, together.
      heldout: evaluation rows that were looked at.
      lengths: int32 [n], tokens of each example before the cut; cut: after it, without those dropped.
      findings: errors first.
      marked: {code: places in the training rows}, the first few of each.
    """

    sources: list[SourceCount]
    rows: int
    picked: int = 0
    looked_at: int = 0
    heldout: int = 0
    used: int = 0
    dropped: int = 0
    truncated: int = 0
    refused: int = 0
    copies: int = 0
    near_copies: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    tokens: int = 0
    trained: int = 0
    findings: list[Finding] = field(default_factory=list)
    marked: dict[str, list[int]] = field(default_factory=dict)

    def failed(self) -> bool:
        return any(finding.severity == ERROR for finding in self.findings)


def survey(
    train: Rows,
    heldout: Sequence[Rows],
    tokenizer,
    ends: Sequence[int],
    settings: Settings,
    max_rows: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Reads, tokenizes and checks the rows.

    Args:
      train, heldout: of data.train and data.eval (see `sources.read_sources`); what cannot be read becomes a finding.
      ends: token ids at which generation stops.
      max_rows: look at no more rows than this, evenly spread over the set; 0: all of them.
      advance: told how many rows are done.
    """
    facts = checks.TokenFacts.of(tokenizer, ends, settings.max_length)
    looked = {"train": array("q"), "eval": array("q")}  # the place in its `Rows` of each row that was checked
    sets = {"train": [train], "eval": list(heldout)}
    firsts = {"train": [0], "eval": []}  # which of those is the first of each `Rows`

    def origin(side: str, i: int) -> str:
        return sets[side][bisect_right(firsts[side], i) - 1][looked[side][i]].origin

    origins = {side: functools.partial(origin, side) for side in looked}
    found = checks.Checks(facts, origins)
    names = train.per_source
    out = Survey([SourceCount(name, weight, count) for (name, count), weight in zip(names, train.weights)], len(train))
    bad = Counter()
    lengths, length_places, cut = array("i"), array("q"), array("i")
    evaluated = Counter()  # rows that are evaluated on by their loss: "tokenized", and of those "kept"

    def look(side: str, rows: Rows, picked: np.ndarray) -> None:
        chunk, places = [], []
        for done, i in enumerate(picked.tolist()):
            if side == "train":
                out.sources[train.source_of(i)].picked += 1
            try:
                row = rows.check(i)  # None: on the other side of the hold-out
            except SourceError:
                raise
            except UserError as error:
                if rows.heldout_side:  # the same row of the same source, which the training side has counted
                    continue
                key = id(rows), rows.source_of(i)
                bad[key] += 1
                message = str(error)
                found.refused(message, message.split(": ", 1)[0], bad[key] <= settings.max_bad_rows)
                out.refused += side == "train"
                continue
            if row is not None:
                chunk.append(row)
                places.append(i)
            if len(chunk) == _CHUNK:
                take(side, rows, chunk, places)
                chunk, places = [], []
                advance(done)
        if chunk:
            take(side, rows, chunk, places)

    def take(side: str, rows: Rows, chunk: list[Row], places: list[int]) -> None:
        looked[side].extend(places)
        for code, which in found.rows(chunk, side):
            if side == "train":
                _mark(out.marked, code, places[which])
        if side == "eval":
            out.heldout += len(chunk)
            evaluate(rows, chunk, places)
            return
        whole, where = [], []
        for row, place in zip(chunk, places):
            source = out.sources[train.source_of(place)]
            source.looked_at += 1
            try:
                examples = made_of(row)
            except NothingTrained:
                out.dropped += 1
                found.add("untrained", row.origin, "weight 0")
                _mark(out.marked, "untrained", place)
                continue
            except UserError as error:
                out.refused += 1
                found.refused(str(error), row.origin)
                _mark(out.marked, "refused", place)
                continue
            whole += examples
            where += [place] * len(examples)
        if not whole:
            return
        documents = [(example.tokens, example.trained) for example in whole]
        for code, which in found.examples(documents, lambda i: whole[i].origin):
            _mark(out.marked, code, where[which])
        for example, place in zip(whole, where):
            source = out.sources[train.source_of(place)]
            trained = int(example.trained[: settings.max_length].sum())
            lengths.append(len(example.tokens))
            length_places.append(place)
            out.truncated += len(example.tokens) > settings.max_length
            if not trained:
                out.dropped += 1
                continue
            kept = min(len(example.tokens), settings.max_length)
            cut.append(kept)
            source.used += 1
            source.tokens += kept
            source.trained += trained

    def made_of(row: Row) -> list[Example]:
        made = examples_of(row, tokenizer, settings.vocab_size, settings.train_on, settings.objective)
        return [example for _, example in made]

    def evaluate(rows: Rows, chunk: list[Row], places: list[int]) -> None:
        for row, place in zip(chunk, places):
            if rows.sources[rows.source_of(place)].name.startswith(TASK):  # scored by generating
                continue
            try:
                kept = any(example.trained[: settings.max_length].any() for example in made_of(row))
            except NothingTrained:
                kept = False
            except UserError as error:
                found.refused(str(error), row.origin)
                continue
            evaluated["tokenized"] += 1
            evaluated["kept"] += kept
            if not kept:
                found.add("eval_untrained", row.origin)

    look("train", train, checks.spread(len(train), max_rows or len(train)))
    for rows in heldout:
        firsts["eval"].append(len(looked["eval"]))
        look("eval", rows, checks.spread(len(rows), max_rows or len(rows)))
    if evaluated["tokenized"] and not evaluated["kept"]:
        found.add("eval_empty")
    out.picked = sum(source.picked for source in out.sources)
    out.looked_at = sum(source.looked_at for source in out.sources)
    out.used = sum(source.used for source in out.sources)
    out.tokens = sum(source.tokens for source in out.sources)
    out.trained = sum(source.trained for source in out.sources)
    out.lengths, out.cut = np.array(lengths, np.int32), np.array(cut, np.int32)
    _whole_set(found, out, train, length_places)
    out.findings = found.finish()
    out.copies, out.near_copies = found.copies, found.near_copies
    for code, positions in found.marked.items():
        for position in positions:
            _mark(out.marked, code, looked["train"][position])
    return out


def _whole_set(found: checks.Checks, out: Survey, train: Sequence[Row], length_places: Sequence[int]) -> None:
    if not out.looked_at and not out.refused:
        found.add("empty")
    if out.dropped > MAX_DROPPED * max(1, out.dropped + len(out.cut)):
        found.add("dropped", count=out.dropped)
    if len(out.sources) > 1:
        found.mixture([source.name for source in out.sources], shares(out.sources))
    for i in checks.unusual_lengths(out.lengths).tolist():
        found.add("length", train[length_places[i]].origin, f"{out.lengths[i]} tokens")
        _mark(out.marked, "length", length_places[i])


def shares(sources: Sequence[SourceCount]) -> list[float]:
    """The share of an epoch's rows that each source gives."""
    # Of the candidates, as many as of those that were asked for.
    weighted = [s.weight * s.rows * s.looked_at / max(1, s.picked) for s in sources]
    return [one / (sum(weighted) or 1) for one in weighted]


@dataclass(frozen=True)
class Epoch:
    """What training is going to do. Numbers of tokens and rows are of a whole epoch.

    Attributes:
      tokens: not counting padding.
      rows: packed ones of max_length tokens; without packing one for each example.
      efficiency: share of the places in rows that hold a token.
      steps: of the whole run.
    """

    tokens: int
    rows: int
    efficiency: float
    steps: int


def epoch_of(found: Survey, settings: Settings) -> Epoch:
    """The plan that follows from the rows looked at, scaled up to all of them."""
    if not len(found.cut):
        return Epoch(0, 0, 0.0, 0)
    if settings.packing:
        rows = packing.count_rows(packing.patterns(np.bincount(found.cut), settings.max_length))
        places = rows * settings.max_length
    else:  # each is padded to the next length of a batch, or a little more: its batch shares one
        rows, steps = len(found.cut), np.array(buckets.choose(found.cut, settings.max_length))
        places = int(steps[np.searchsorted(steps, found.cut)].sum())
    efficiency = float(found.cut.sum() / places)
    # Weighted sources count as often as they occur in an epoch; what was not looked at is like what was.
    scale = [source.weight * source.rows / max(1, source.picked) for source in found.sources]
    tokens = sum(source.tokens * factor for source, factor in zip(found.sources, scale))
    all_rows = math.ceil(rows * tokens / max(1, found.tokens))
    steps = settings.steps or math.ceil(all_rows * settings.epochs / settings.batch_size)
    return Epoch(round(tokens), all_rows, efficiency, steps)


def _mark(marked: dict[str, list[int]], code: str, place: int) -> None:
    places = marked.setdefault(code, [])
    if len(places) < 200 and place not in places[-1:]:
        places.append(place)
