"""One pass over the rows of a run's config: counts, lengths, findings, and what an epoch costs."""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ftjax.data.audit import checks
from ftjax.data.audit.findings import ERROR, MAX_DROPPED, Finding
from ftjax.data.batch import buckets, packing
from ftjax.data.format.example import Row
from ftjax.data.pipeline import DataSpec
from ftjax.data.read.rows import Rows
from ftjax.data.read.sources import TASK
from ftjax.data.tokens.chat import NothingTrained
from ftjax.data.tokens.kinds import ROW_KINDS, Documents, cut
from ftjax.errors import SourceError, UserError

_CHUNK = 256


@dataclass
class SourceCount:
    """The counts of one source.

    Attributes:
      rows: that it has; picked: of these, for the survey; looked_at: of these, that could be read and are not held out;
        used: examples of these that are trained on.
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


def _total(name: str) -> property:
    """A count of `SourceCount`, summed over the sources."""
    return property(lambda survey: sum(getattr(source, name) for source in survey.sources))


@dataclass
class Survey:
    """What the pass found. `rows`, `picked`, `looked_at`, `used`, `tokens` and `trained` are those of all sources.

    Attributes:
      sources: of the training rows, in the order of the config.
      heldout: evaluation rows that were looked at.
      tokenized, split, dropped, truncated, refused: rows; of those split each answer is an example (a template renders
        it differently once the conversation goes on), those dropped have no trained token.
      copies, near_copies: rows that are like an earlier one.
      lengths: int32 [n], tokens of each document before the cut.
      cut: int32 [m], tokens of each example after it, without those dropped.
      findings: errors first.
      marked: {code: indices of training rows}, the first few of each.
    """

    sources: list[SourceCount]
    heldout: int = 0
    tokenized: int = 0
    split: int = 0
    dropped: int = 0
    truncated: int = 0
    refused: int = 0
    copies: int = 0
    near_copies: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
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
    surveyor = _Surveyor(train, tokenizer, spec, checks.TokenFacts.of(tokenizer, ends, spec.max_length, known_rows))
    for indices, rows in surveyor.read("train", train, max_rows, advance):
        surveyor.check_rows("train", train, indices, rows)
        surveyor.check_documents(surveyor.tokenize(indices, rows))
    for rows_of_set in heldout:
        for indices, rows in surveyor.read("eval", rows_of_set, max_rows, advance):
            surveyor.check_rows("eval", rows_of_set, indices, rows)
            surveyor.check_evaluated(rows_of_set, indices, rows)
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
    """The state of the pass. Its methods stand in the order in which rows go through them."""

    def __init__(self, train: Rows, tokenizer, spec: DataSpec, facts: checks.TokenFacts):
        self._train, self._tokenizer, self._spec = train, tokenizer, spec
        self._seen = {"train": _Seen(), "eval": _Seen()}
        self._checks = checks.Checks(facts, {side: seen.origin for side, seen in self._seen.items()})
        counts = zip(train.per_source, train.weights)
        self._out = Survey([SourceCount(name, weight, count) for (name, count), weight in counts])
        self._lengths, self._cut = array("i"), array("i")
        self._length_rows = array("q")  # the index of the training row of each of the lengths
        self._bad: Counter[tuple[int, int]] = Counter()  # refused rows by set and source
        self._eval_tokenized = self._eval_kept = 0  # evaluation rows with a loss, and those with a trained token

    def read(
        self, side: str, rows: Rows, max_rows: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[list[int], list[Row]]]:
        """Chunks of the rows that are good and on this side of the hold-out, with their indices in `rows`."""
        indices, chunk = [], []
        for done, i in enumerate(checks.spread(len(rows), max_rows or len(rows)).tolist()):
            if side == "train":
                self._out.sources[rows.source_of(i)].picked += 1
            try:
                row = rows.check(i)
            except SourceError:
                raise
            except UserError as error:
                # The held-out side reads the same sources again, and the training side has counted the row.
                if not rows.heldout_side:
                    self._refused(rows, i, str(error).split(": ", 1)[0], error)
                    self._out.refused += side == "train"
                continue
            if row is None:
                continue
            indices.append(i)
            chunk.append(row)
            if len(chunk) == _CHUNK:
                yield indices, chunk
                indices, chunk = [], []
                advance(done)
        if chunk:
            yield indices, chunk

    def check_rows(self, side: str, rows: Rows, indices: Sequence[int], chunk: Sequence[Row]) -> None:
        self._seen[side].add(rows, indices)
        for code, i in self._checks.rows(chunk, side):
            if side == "train":
                self._out.mark(code, indices[i])

    def tokenize(self, indices: Sequence[int], chunk: Sequence[Row]) -> list[tuple[int, Row, list[Documents]]]:
        """Training rows with their index and the documents of each of their examples, which are not cut."""
        tokenized = []
        for index, row in zip(indices, chunk):
            self._source(index).looked_at += 1
            parts = self._parts_of(self._train, index, row)
            if parts is None:
                self._out.refused += 1
                self._out.mark("refused", index)
            elif not parts:
                self._out.dropped += 1
                self._checks.findings.add("untrained", row.origin, "weight 0")
                self._out.mark("untrained", index)
            else:
                self._out.split += len(parts) > 1
                tokenized.append((index, row, parts))
        return tokenized

    def check_documents(self, tokenized: Sequence[tuple[int, Row, list[Documents]]]) -> None:
        """Checks the documents of a chunk, and counts them as they are cut."""
        if not tokenized:
            return
        examples = [list(documents.values()) for *_, parts in tokenized for documents in parts]
        owners = [(index, row) for index, row, parts in tokenized for _ in parts]
        for code, i in self._checks.examples(examples, lambda i: owners[i][1].origin):
            self._out.mark(code, owners[i][0])
        self._out.tokenized += len(tokenized)
        for index, row, parts in tokenized:
            lengths = [len(document.tokens) for documents in parts for document in documents.values()]
            self._lengths.extend(lengths)
            self._length_rows.extend([index] * len(lengths))
            self._out.truncated += max(lengths) > self._spec.max_length
            try:
                whole = [cut(documents, self._spec.max_length, row.origin) for documents in parts]
            except UserError as error:
                self._refused(self._train, index, row.origin, error)
                self._out.refused += 1
                self._out.mark("refused", index)
                continue
            kept = [example for example in whole if example.trained.any()]
            self._out.dropped += not kept
            source = self._source(index)
            for example in kept:
                self._cut.append(len(example.tokens))
                source.used += 1
                source.tokens += len(example.tokens)
                source.trained += int(example.trained.sum())

    def check_evaluated(self, rows: Rows, indices: Sequence[int], chunk: Sequence[Row]) -> None:
        """Evaluation rows that have no part in the loss are reported."""
        self._out.heldout += len(chunk)
        for index, row in zip(indices, chunk):
            if rows.sources[rows.source_of(index)].name.startswith(TASK):  # scored by generating, without a loss
                continue
            parts = self._parts_of(rows, index, row)
            if parts is None:
                continue
            try:
                kept = any(cut(part, self._spec.max_length, row.origin).trained.any() for part in parts)
            except UserError as error:
                self._refused(rows, index, row.origin, error)
                continue
            self._eval_tokenized += 1
            self._eval_kept += kept
            if not kept:
                self._checks.findings.add("eval_untrained", row.origin)

    def finish(self) -> Survey:
        out, findings = self._out, self._checks.findings
        out.lengths, out.cut = np.array(self._lengths, np.int32), np.array(self._cut, np.int32)
        if self._eval_tokenized and not self._eval_kept:
            findings.add("eval_empty")
        if not out.looked_at and not out.refused:
            findings.add("empty")
        if out.dropped > MAX_DROPPED * max(1, out.dropped + len(out.cut)):
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

    def _source(self, index: int) -> SourceCount:
        return self._out.sources[self._train.source_of(index)]

    def _refused(self, rows: Rows, index: int, origin: str, error: UserError) -> None:
        """A finding, and no error where config.data.max_bad_rows lets training skip the row."""
        key = id(rows), rows.source_of(index)
        self._bad[key] += 1
        self._checks.refused(str(error), origin, self._bad[key] <= self._spec.max_bad_rows)

    def _parts_of(self, rows: Rows, index: int, row: Row) -> list[Documents] | None:
        """[] where nothing of the row is trained; None where it is refused, which becomes a finding."""
        spec = self._spec
        try:
            return ROW_KINDS[spec.kind].tokenize(row, self._tokenizer, spec.vocab_size, spec.train_on)
        except NothingTrained:
            return []
        except UserError as error:
            self._refused(rows, index, row.origin, error)
            return None


def shares(sources: Sequence[SourceCount]) -> list[float]:
    """The share of an epoch's rows that each source gives."""
    # What holds for the rows that were picked is taken to hold for all rows of the source.
    weighted = [s.weight * s.rows * s.looked_at / max(1, s.picked) for s in sources]
    return [rows / (sum(weighted) or 1) for rows in weighted]


@dataclass(frozen=True)
class Epoch:
    """What training is going to do.

    Attributes:
      tokens: of an epoch, without padding.
      rows: of an epoch: packed ones of `DataSpec.row_length` tokens; without packing one for each example.
      efficiency: share of the positions in rows that hold a token.
      steps, epochs: of the whole run.
    """

    tokens: int
    rows: int
    efficiency: float
    steps: int
    epochs: float


def epoch_of(survey: Survey, spec: DataSpec, steps: int, epochs: float) -> Epoch:
    """What follows for training from the rows looked at, scaled up to all rows; steps 0: as many as `epochs` need."""
    if not len(survey.cut):
        return Epoch(0, 0, 0.0, 0, 0.0)
    if spec.packing:
        rows = packing.count_rows(packing.patterns(np.bincount(survey.cut), spec.row_length))
        positions = rows * spec.row_length
    else:  # an example is padded to the next of the batches' lengths, or a little more: all of a batch share one
        rows, lengths = len(survey.cut), np.array(buckets.batch_lengths(survey.cut, spec.row_length))
        positions = int(lengths[np.searchsorted(lengths, survey.cut)].sum())
    efficiency = float(survey.cut.sum() / positions)
    # A source counts as often as its weight says, and rows not looked at are taken to be like the others.
    scale = [source.weight * source.rows / max(1, source.picked) for source in survey.sources]
    tokens = sum(source.tokens * factor for source, factor in zip(survey.sources, scale))
    all_rows = math.ceil(rows * tokens / max(1, survey.tokens))
    total = steps or math.ceil(all_rows * epochs / spec.batch_size)
    return Epoch(round(tokens), all_rows, efficiency, total, total * spec.batch_size / max(1, all_rows))
