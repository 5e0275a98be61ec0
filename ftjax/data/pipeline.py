"""Entries of data.train or data.eval -> loader: read, check, tokenize, pack. Shared by training and inspection."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from ftjax.data.audit.findings import MAX_DROPPED
from ftjax.data.batch import beginnings
from ftjax.data.batch.loader import Loader
from ftjax.data.read.rows import Rows
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.examples import Examples, join
from ftjax.data.tokens.kinds import PLAIN, ROW_KINDS, Settings
from ftjax.data.tokens.outcome import TokenRules
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.data.tokens.tokenize import tokenize
from ftjax.errors import UserError

log = logging.getLogger(__name__)

Counter = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """All that decides what a run is trained on, apart from the rows and the tokenizer."""

    kind: str  # what a row is, a key of `kinds.ROW_KINDS`
    max_length: int  # the most tokens of a document; it is cut there
    batch_size: int  # rows of a batch, over all devices and micro-batches
    packing: bool  # several examples in a row, or one
    train_on: str  # the turns of a conversation that are trained, see `chat.tokenize`
    vocab_size: int  # every token id must be below it
    seed: int = 0  # of the order of examples
    max_bad_rows: int = 0  # how many malformed rows of a source may be skipped
    holdout: float = 0.0  # the share of the training rows that are held out for evaluation
    multiple: int = 1  # without packing, batch lengths are multiples of it
    long_text: str = "divide"  # or cut: what becomes of a text of more than max_length tokens
    chosen_length: int = 0  # tokens of a row of a batch; 0: `longest`
    mismatched: bool = False  # batches have prompts with completions of other rows, too (`mismatched.MISMATCHED`)
    settings: Settings = PLAIN  # what config.objective says about rows
    shares: bool = False  # rows hold what their documents begin with alike only once (`beginnings`)

    @property
    def longest(self) -> int:
        """The most tokens of an example: all its documents, each as long as it may be."""
        return self.max_length * ROW_KINDS[self.kind].documents

    @property
    def row_length(self) -> int:
        """Tokens of a row of a batch: one example always fits, so no document is cut to make room for another."""
        return self.chosen_length or self.longest

    @property
    def rules(self) -> TokenRules:
        """What decides the tokens of a row."""
        return TokenRules(self.max_length, self.vocab_size, self.train_on, self.kind, self.long_text, self.settings)


def _uncounted(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return contextlib.nullcontext(lambda done: None)


def read(entries: Sequence[dict], tokenizer: Tokenizer, spec: DataSpec, counter: Counter = _uncounted) -> Examples:
    """The tokenized training rows of `entries` (see `sources.read_sources`), with `tokenize`'s report on them.

    counter: shows the progress of tokenization (`Display.counter`).

    Raises:
      UserError: there are none.
    """
    rows = training_rows(entries, spec)
    examples = _tokenized(rows, tokenizer, spec, MAX_DROPPED, counter)
    if not len(examples):
        names = ", ".join(str(entry["source"]) for entry in entries)
        raise UserError(f"config.data: {names} has no rows to train on; check the sources")
    return examples


def training_rows(entries: Sequence[dict], spec: DataSpec) -> Rows:
    """The rows of `entries` on the training side of the hold-out; those of prompts may do without an answer."""
    if not ROW_KINDS[spec.kind].answered:
        entries = [entry | {"score": ""} for entry in entries]
    return read_sources(entries, spec.max_bad_rows, spec.holdout, heldout_side=False)


def load(
    entries: Sequence[dict], tokenizer: Tokenizer, spec: DataSpec, counter: Counter = _uncounted
) -> tuple[Loader, dict]:
    """The loader of the training rows, and `tokenize`'s report on them; arguments as of `read`."""
    examples = read(entries, tokenizer, spec, counter)
    return training_loader(examples, spec), examples.report


def sizes(examples: Examples, spec: DataSpec) -> tuple[np.ndarray, int]:
    """int [N], tokens that each example adds to a row of a batch, and those that every row has once besides.

    Raises:
      UserError: nothing is shared where that is asked for.
    """
    if not spec.shares:
        return examples.lengths, 0
    alike = beginnings.of(examples)
    check_shared(int(alike.begins.sum()), spec)
    return alike.sizes, alike.prefix


def check_shared(tokens: int, spec: DataSpec) -> None:
    """UserError where rows are to share what their documents begin with and there are no such tokens."""
    if spec.shares and not tokens:
        raise UserError(
            "config.data.share_prefixes: the rows of config.data.train begin with nothing in common that is not "
            f"trained (config.data.train_on={spec.train_on!r}); set --config.data.share_prefixes=False, or begin "
            "them with one system message"
        )


def training_loader(examples: Examples, spec: DataSpec) -> Loader:
    return _loader(examples, spec, spec.row_length, shuffle=True)


def read_heldout(entries: Sequence[dict], train: Sequence[dict], spec: DataSpec) -> list[Rows]:
    """All rows of `entries`, and those of `train` that are held out, where there are such; none that are replayed."""
    train = [entry for entry in train if "replay" not in entry]
    sets = [read_sources(entries, spec.max_bad_rows)] if entries else []
    if spec.holdout:
        sets.append(read_sources(train, spec.max_bad_rows, spec.holdout, heldout_side=True))
    return sets


def load_heldout(
    entries: Sequence[dict],
    train: Sequence[dict],
    tokenizer: Tokenizer,
    spec: DataSpec,
    counter: Counter = _uncounted,
) -> Loader | None:
    """The loader of the rows of `read_heldout`; None if there are none.

    Its rows are as long as those of training, or where an example needs more as the longest that there may be.
    """
    # Any number may be dropped: in a small set one long row is more than the usual share.
    tokenized = [_tokenized(rows, tokenizer, spec, 1.0, counter) for rows in read_heldout(entries, train, spec)]
    if not tokenized:
        return None
    examples = join(tokenized)
    alike = beginnings.of(examples) if spec.shares and len(examples) else None
    needed = examples.lengths.max(initial=0) if alike is None else alike.prefix + alike.sizes.max()
    length = spec.row_length if needed <= spec.row_length else spec.longest
    return _loader(examples, spec, length, shuffle=False)


def _loader(examples: Examples, spec: DataSpec, length: int, shuffle: bool) -> Loader:
    mismatched = spec.max_length if spec.mismatched else 0
    order = spec.packing, spec.seed, shuffle, spec.multiple
    return Loader(examples, spec.batch_size, length, *order, mismatched, spec.shares)


def _tokenized(rows: Rows, tokenizer: Tokenizer, spec: DataSpec, max_dropped: float, counter: Counter) -> Examples:
    with counter("tokenizing", len(rows)) as advance:
        tokenized = tokenize(
            rows,
            tokenizer,
            spec.max_length,
            vocab_size=spec.vocab_size,
            train_on=spec.train_on,
            kind=spec.kind,
            long_text=spec.long_text,
            settings=spec.settings,
            max_dropped=max_dropped,
            progress=advance,
        )
    report = tokenized.report
    if report["split"]:
        text = (
            "%d of %d rows are split by answer, which makes %d examples of all rows: the chat template renders an "
            "answer differently once the conversation goes on"
        )
        log.warning(text, report["split"], report["rows"], report["examples"])
    if report["dropped"] > MAX_DROPPED * report["rows"]:
        text = "%s: %d of %d rows are left out: %s"
        names = ", ".join(source["source"] for source in report["per_source"])
        log.warning(text, names, report["dropped"], report["rows"], spec.rules.lacking)
    return tokenized
