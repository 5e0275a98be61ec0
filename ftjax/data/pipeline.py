"""Entries of data.train or data.eval -> loader: read, check, tokenize, pack. What training and inspection share."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ftjax.data.audit.findings import MAX_DROPPED
from ftjax.data.batch.loader import Loader
from ftjax.data.read.sources import read_sources
from ftjax.data.tokens import examples
from ftjax.data.tokens.tokenize import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _uncounted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def load(
    entries: Sequence[dict],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_length: int,
    batch_size: int,
    packing: bool,
    seed: int,
    shuffle: bool,
    max_bad_rows: int,
    vocab_size: int,
    train_on: str = "assistant",
    holdout: float = 0.0,
    heldout_of: Sequence[dict] = (),
    multiple: int = 1,
    max_dropped: float = MAX_DROPPED,
    counter: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _uncounted,
) -> tuple[Loader, dict]:
    """The loader of all rows of `entries` (see `sources.read_sources`), and `tokenize`'s report on them.

    Args:
      holdout: the share of rows that are held out for evaluation.
      heldout_of: entries of which only the held-out rows are taken, after those of `entries`. Where there are none, the
        rows of `entries` that are held out are left out.
      multiple: of what the lengths of batches are multiples where packing is off.
      max_dropped: the share of the rows that may be left with no trained token; more than MAX_DROPPED are told.
      counter: shows how far tokenization has come (`Display.counter`).
    """
    sides = [(entries, 0.0 if heldout_of else holdout, False), (heldout_of, holdout, True)]
    sets = []
    for some, share, heldout in sides:
        if some:
            rows = read_sources(some, max_bad_rows, share, heldout)
            with counter("tokenizing", len(rows)) as advance:
                sets.append(
                    tokenize(
                        rows,
                        tokenizer,
                        max_length,
                        vocab_size=vocab_size,
                        train_on=train_on,
                        max_dropped=max_dropped,
                        progress=advance,
                    )
                )
            report = sets[-1].report
            if report["dropped"] > MAX_DROPPED * report["rows"]:
                text = "%s: %d of %d rows are left out: no trained token within data.max_length = %d"
                names = ", ".join(one["source"] for one in report["per_source"])
                log.warning(text, names, report["dropped"], report["rows"], max_length)
    found = examples.join(sets)
    return Loader(found, batch_size, max_length, packing, seed, shuffle, multiple), found.report
