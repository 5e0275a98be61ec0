"""One pass over the rows of a run's config: counts, lengths, findings, and what an epoch costs."""

import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR, MAX_DROPPED, Finding
from ftjax.data.batch import beginnings, buckets, packing
from ftjax.data.format.example import Document, Row
from ftjax.data.pipeline import DataSpec
from ftjax.data.read.rows import BadRows, Rows
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.data.tokens.outcome import Outcome, outcome
from ftjax.errors import UserError

_CHUNK = 256


@dataclass
class SourceCount:
    """The counts of one source.

    Attributes:
      rows: that it has; picked: of these, for the survey; looked_at: of these, that could be read and are not held out;
        used: examples of these that are trained on; good: of these, that are called good.
      tokens, trained: of its examples as they are cut.
    """

    name: str
    weight: float
    rows: int = 0
    picked: int = 0
    looked_at: int = 0
    used: int = 0
    good: int = 0
    tokens: int = 0
    trained: int = 0


def _total(name: str) -> property:
    """A count of `SourceCount`, summed over the sources."""
    return property(lambda survey: sum(getattr(source, name) for source in survey.sources))


@dataclass
class Survey:
    """What the pass found. `rows`, `picked`, `looked_at`, `used`, `tokens` and `trained` are those of all sources.

    Attributes:
      sources: of the training rows, in the order of the config.
      heldout: evaluation rows that were looked at.
      tokenized, split, dropped, truncated, divided, refused: rows; of those split each answer is an example (a template
        renders it differently once the conversation goes on), those dropped have no trained token, those divided are
        long texts that go on in further examples.
      copies, near_copies: rows that are like an earlier one.
      lengths: int32 [n], tokens of each document before the cut.
      cut: int32 [m], tokens that each example adds to a row after it, without those dropped.
      prefix: tokens that every row has once besides, where its documents share what they begin with.
      findings: errors first.
      marked: {code: indices of training rows}, the first few of each.
    """

    sources: list[SourceCount]
    heldout: int = 0
    tokenized: int = 0
    split: int = 0
    dropped: int = 0
    truncated: int = 0
    divided: int = 0
    refused: int = 0
    copies: int = 0
    near_copies: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    prefix: int = 0
    findings: list[Finding] = field(default_factory=list)
    marked: dict[str, list[int]] = field(default_factory=dict)

    rows, picked, looked_at = _total("rows"), _total("picked"), _total("looked_at")
    used, tokens, trained = _total("used"), _total("tokens"), _total("trained")

    def failed(self) -> bool:
        return any(finding.severity == ERROR for finding in self.findings)

    def mark(self, code: str, row: int) -> None:
        rows = self.marked.setdefault(code, [])
        if len(rows) < checks.MAX_MARKED and row not in rows[-1:]:
            rows.append(row)


def survey(
    train: Rows,
    heldout: Sequence[Rows],
    tokenizer,
    ends: Sequence[int],
    spec: DataSpec,
    max_rows: int = 0,
    advance: Callable[[int], None] = lambda done: None,
    known_rows: int | None = None,
) -> Survey:
    """Reads, tokenizes and checks the rows.

    Args:
      train, heldout: of data.train and data.eval (see `sources.read_sources`); a row that cannot be read becomes a
        finding.
      ends: token ids at which generation stops.
      max_rows: look at no more rows than this, evenly spread over the set; 0: all of them.
      advance: is called with the number of rows that are done.
      known_rows: see `checks.TokenFacts.of`.
    """
    answered = ROW_KINDS[spec.kind].answered
    facts = checks.TokenFacts.of(tokenizer, ends, spec.max_length, known_rows, answered)
    surveyor = _Surveyor(train, tokenizer, spec, facts)
    for chunk in surveyor.read("train", train, max_rows, advance):
        surveyor.check_rows("train", train, chunk)
        surveyor.check_examples(chunk)
    for rows in heldout:
        for chunk in surveyor.read("eval", rows, max_rows, advance):
            surveyor.check_rows("eval", rows, chunk)
    return surveyor.finish()


class _Seen:
    """The rows of one side that were checked, in their order: their set and their index in it, 10 bytes a row."""

    def __init__(self):
        self.indices = array("q")
        self._sets, self._set_numbers = [], array("H")

    def add(self, rows: Rows, indices: Sequence[int]) -> None:
        if not self._sets or self._sets[-1] is not rows:
            self._sets.append(rows)
        self.indices.extend(indices)
        self._set_numbers.extend([len(self._sets) - 1] * len(indices))

    def origin(self, i: int) -> str:
        return self._sets[self._set_numbers[i]].origin(self.indices[i])


class _Surveyor:
    """The state of the pass. Its methods stand in the order in which rows go through them.

    What becomes of each row is what `tokens.outcome` says, as in training; only rows with an example are checked.
    """

    def __init__(self, train: Rows, tokenizer, spec: DataSpec, facts: checks.TokenFacts):
        self._train, self._tokenizer, self._spec = train, tokenizer, spec
        self._seen = {"train": _Seen(), "eval": _Seen()}
        self._checks = checks.Checks(facts, {side: seen.origin for side, seen in self._seen.items()})
        counts = zip(train.per_source, train.sources)
        self._out = Survey([SourceCount(name, source.weight, count) for (name, count), source in counts])
        self._lengths, self._cut = array("i"), array("i")
        self._first: Document | None = None  # of all documents, and what all that were looked at begin with alike
        self._prefix: int | None = None
        self._length_rows = array("q")  # the index of the training row of each of the lengths

    def read(
        self, side: str, rows: Rows, max_rows: int, advance: Callable[[int], None]
    ) -> Iterator[list[tuple[int, Outcome]]]:
        """Chunks of the rows that are trained on, or evaluated: the index in `rows` of each, and its outcome."""
        picked = checks.spread(len(rows), max_rows or len(rows)).tolist()
        bad, good, kept, chunk = BadRows(rows), np.zeros(len(rows.sources), np.int64), 0, []
        refused = False
        for done, i in enumerate(picked):
            source = rows.source_of(i)
            if side == "train":
                self._out.sources[source].picked += 1
            if (found := self._outcome(rows, i)) is None:
                continue
            if found.bad:
                refused |= not self._skipped(side, rows, i, found, bad)
                continue
            good[source] += 1
            if found.dropped:
                self._dropped(side, i, found)
                continue
            kept += 1
            chunk.append((i, found))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
                advance(done)
        if chunk:
            yield chunk
        if side == "train":
            for source, count in zip(self._out.sources, good.tolist()):
                source.looked_at = count
        elif good.sum() and not kept:
            self._checks.findings.add("eval_empty")
        if len(picked) == len(rows) and not refused:  # on which side those rows would be is not known
            try:
                bad.refuse(good)
            except UserError as error:
                self._checks.findings.add("empty", what=str(error))

    def _outcome(self, rows: Rows, i: int) -> Outcome | None:
        if rows is self._train or not rows.sources[rows.source_of(i)].scored:
            return outcome(rows, i, self._tokenizer, self._spec.rules)
        row = rows.check(i)  # scored by generating, without a loss
        return row and Outcome(row, ())

    def _skipped(self, side: str, rows: Rows, i: int, found: Outcome, bad: BadRows) -> bool:
        """Whether config.data.max_bad_rows lets training skip a bad row; a finding about it, an error where not."""
        try:
            bad.skip(i, found.bad)
            allowed = True
        except UserError:
            allowed = False
        # The held-out side reads the same sources again: of what cannot be read the training side has told.
        if not (rows.heldout_side and found.row is None and (allowed or not rows.max_bad_rows)):
            self._checks.refused(found.bad, rows.origin(i), allowed)
        if side == "train":
            self._out.refused += 1
            self._out.mark("refused", i)
        return allowed

    def _dropped(self, side: str, i: int, found: Outcome) -> None:
        if side == "eval":
            self._out.heldout += 1
            self._checks.findings.add("eval_untrained", found.row.origin)
            return
        self._out.dropped += 1
        for code in ("untrained", "truncated") if found.longest > self._spec.max_length else ("untrained",):
            self._checks.findings.add(code, found.row.origin, found.dropped)
            self._out.mark(code, i)
        self._measure(i, found)

    def check_rows(self, side: str, rows: Rows, chunk: Sequence[tuple[int, Outcome]]) -> None:
        """Checks the text of the rows of a chunk."""
        self._seen[side].add(rows, [index for index, _ in chunk])
        for code, i in self._checks.rows([found.row for _, found in chunk], side):
            if side == "train":
                self._out.mark(code, chunk[i][0])
        if side == "eval":
            self._out.heldout += len(chunk)

    def check_examples(self, chunk: Sequence[tuple[int, Outcome]]) -> None:
        """Checks the tokens of a chunk of training rows, and counts them."""
        given: list[tuple[int, Row, list[Document]]] = []
        for index, found in chunk:
            self._measure(index, found)
            # Of a row that is cut the whole documents: what the cut does to them is reported.
            parts = [list(documents.values()) for documents in found.parts]
            if found.divided:
                parts = [example.documents for example in found.examples]
            given += [(index, found.row, documents) for documents in parts]
            self._out.split += found.split
            self._out.divided += found.divided
            source = self._out.sources[self._train.source_of(index)]
            source.used += len(found.examples)
            for example in found.examples:
                self._cut.append(len(example.tokens) - self._shared(example.documents))
                source.tokens += len(example.tokens)
                source.trained += int(example.trained.sum())
                source.good += example.labels is not None and bool(example.labels[0] > 0)
        for code, i in self._checks.examples([documents for *_, documents in given], lambda i: given[i][1].origin):
            self._out.mark(code, given[i][0])

    def _shared(self, documents: list[Document]) -> int:
        """How many tokens of an example those before them in it have; notes what all examples begin with."""
        if not self._spec.shares:
            return 0
        self._first = self._first or documents[0]
        alike = [beginnings.alike(document, self._first) for document in documents]
        self._prefix = min([*alike, len(self._first.tokens) if self._prefix is None else self._prefix])
        return sum(beginnings.alike(after, before) for before, after in itertools.pairwise(documents))

    def _measure(self, index: int, found: Outcome) -> None:
        self._out.truncated += found.longest > self._spec.max_length and not found.divided
        self._out.tokenized += bool(found.parts)
        lengths = [len(document.tokens) for documents in found.parts for document in documents.values()]
        self._lengths.extend(lengths)
        self._length_rows.extend([index] * len(lengths))

    def finish(self) -> Survey:
        out, findings = self._out, self._checks.findings
        trained = [source.trained * source.rows / max(1, source.picked) for source in out.sources]
        for source, weight in zip(out.sources, self._train.weights(trained)):
            source.weight = weight
        out.prefix = self._prefix or 0
        out.lengths, out.cut = np.array(self._lengths, np.int32), np.array(self._cut, np.int32) - out.prefix
        if out.dropped > MAX_DROPPED * out.looked_at:
            findings.add("dropped", count=out.dropped)
        if len(out.sources) > 1:
            self._checks.mixture([source.name for source in out.sources], shares(out.sources))
        for i in checks.unusual_lengths(out.lengths).tolist():
            index = self._length_rows[i]
            findings.add("length", self._train.origin(index), f"{out.lengths[i]} tokens")
            out.mark("length", index)
        out.findings = self._checks.finish()
        out.copies, out.near_copies = self._checks.copies, self._checks.near_copies
        for code, positions in self._checks.marked.items():
            for position in positions:
                out.mark(code, self._seen["train"].indices[position])
        return out


def shares(sources: Sequence[SourceCount]) -> list[float]:
    """The share of an epoch's rows that each source gives."""
    # What holds for the rows that were picked is taken to hold for all rows of the source.
    weighted = [s.weight * s.rows * s.looked_at / max(1, s.picked) for s in sources]
    return [rows / (sum(weighted) or 1) for rows in weighted]


def examples_in_epoch(survey: Survey, of: str = "used") -> float:
    """How many examples an epoch has; of: "good" counts only those that are called good.

    A source counts as often as its weight says, and rows not looked at are taken to be like the others.
    """
    return sum(getattr(source, of) * source.weight * source.rows / max(1, source.picked) for source in survey.sources)


@dataclass(frozen=True)
class Epoch:
    """What training is going to do.

    Attributes:
      tokens: that the rows of an epoch hold, without padding.
      rows: of an epoch: packed ones of `DataSpec.row_length` tokens; without packing one for each example.
      efficiency: share of the positions in rows that hold a token.
      examples: of a batch.
      steps, epochs: of the whole run.
    """

    tokens: int
    rows: int
    efficiency: float
    examples: float
    steps: int
    epochs: float


def epoch_of(survey: Survey, spec: DataSpec, steps: int, epochs: float) -> Epoch:
    """What follows for training from the rows looked at, scaled up to all rows; steps 0: as many as `epochs` need."""
    if not len(survey.cut):
        return Epoch(0, 0, 0.0, 0.0, 0, 0.0)
    if spec.packing:
        rows = packing.count_rows(packing.patterns(np.bincount(survey.cut), spec.row_length - survey.prefix))
        positions = rows * spec.row_length
    else:  # an example is padded to the next of the batches' lengths, or a little more: all of a batch share one
        rows, lengths = len(survey.cut), np.array(buckets.batch_lengths(survey.cut, spec.row_length))
        positions = int(lengths[np.searchsorted(lengths, survey.cut)].sum())
    held = int(survey.cut.sum()) + survey.prefix * rows
    efficiency = held / positions
    # A source counts as often as its weight says, and rows not looked at are taken to be like the others.
    scale = [source.weight * source.rows / max(1, source.picked) for source in survey.sources]
    tokens = sum(source.tokens * factor for source, factor in zip(survey.sources, scale))
    all_rows = math.ceil(rows * tokens / max(1, survey.tokens))
    total = steps or math.ceil(all_rows * epochs / spec.batch_size)
    examples = spec.batch_size * len(survey.cut) / rows
    tokens *= held / max(1, survey.tokens)
    return Epoch(round(tokens), all_rows, efficiency, examples, total, total * spec.batch_size / max(1, all_rows))
