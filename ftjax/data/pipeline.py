"""Entries of data.train or data.eval -> loader: read, check, tokenize, pack. Shared by training and inspection."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ftjax.data.audit.findings import MAX_DROPPED
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import examples
from ftjax.data.tokens.kinds import ROW_KINDS
from ftjax.data.tokens.tokenize import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """All that decides what a run is trained on, apart from the rows and the tokenizer.

    Attributes:
      kind: what a row is, a key of `kinds.ROW_KINDS`.
      max_length: the most tokens of a document; it is cut there.
      batch_size: rows of a batch, over all devices and micro-batches.
      packing: several examples in a row, or one.
      train_on: the turns of a conversation that are trained, see `chat.tokenize`.
      vocab_size: every token id must be below it.
      seed: of the order of examples.
      max_bad_rows: how many malformed rows of a source may be skipped.
      holdout: the share of the training rows that are held out for evaluation.
      multiple: without packing, batch lengths are multiples of it.
    """

    kind: str
    max_length: int
    batch_size: int
    packing: bool
    train_on: str
    vocab_size: int
    seed: int = 0
    max_bad_rows: int = 0
    holdout: float = 0.0
    multiple: int = 1

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch: one example always fits, so no document is cut to make room for another."""
        return self.max_length * ROW_KINDS[self.kind].documents


@contextlib.contextmanager
def _uncounted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def load(
    entries: Sequence[dict], tokenizer: "PreTrainedTokenizerFast", spec: DataSpec, counter: Counter = _uncounted
) -> tuple[Loader, dict]:
    """The loader of the training rows of `entries` (see `sources.read_sources`), and `tokenize`'s report on them.

    counter: shows the progress of tokenization (`Display.counter`).
    """
    rows = _tokenized(entries, tokenizer, spec, spec.holdout, False, MAX_DROPPED, counter)
    return _loader(rows, spec, shuffle=True), rows.report


def load_heldout(
    entries: Sequence[dict],
    train: Sequence[dict],
    tokenizer: "PreTrainedTokenizerFast",
    spec: DataSpec,
    counter: Counter = _uncounted,
) -> Loader | None:
    """The loader of all rows of `entries`, then of those of `train` that are held out; None if there are neither."""
    sets = [_tokenized(entries, tokenizer, spec, 0.0, False, 1.0, counter)] if entries else []
    if spec.holdout:
        # Any number may be dropped: in a small set one long row is more than the usual share.
        sets.append(_tokenized(train, tokenizer, spec, spec.holdout, True, 1.0, counter))
    return _loader(examples.join(sets), spec, shuffle=False) if sets else None


def _tokenized(
    entries: Sequence[dict],
    tokenizer: "PreTrainedTokenizerFast",
    spec: DataSpec,
    holdout: float,
    heldout_side: bool,
    max_dropped: float,
    counter: Counter,
) -> examples.Examples:
    rows = read_sources(entries, spec.max_bad_rows, holdout, heldout_side)
    with counter("tokenizing", len(rows)) as advance:
        tokenized = tokenize(
            rows,
            tokenizer,
            spec.max_length,
            vocab_size=spec.vocab_size,
            train_on=spec.train_on,
            kind=spec.kind,
            max_dropped=max_dropped,
            progress=advance,
        )
    report = tokenized.report
    if report["dropped"] > MAX_DROPPED * report["rows"]:
        text = "%s: %d of %d rows are left out: no trained token within data.max_length = %d"
        names = ", ".join(source["source"] for source in report["per_source"])
        log.warning(text, names, report["dropped"], report["rows"], spec.max_length)
    return tokenized


def _loader(rows: examples.Examples, spec: DataSpec, shuffle: bool) -> Loader:
    return Loader(rows, spec.batch_size, spec.row_length, spec.packing, spec.seed, shuffle, spec.multiple)
