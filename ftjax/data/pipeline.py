"""Entries of data.train or data.eval -> loader: read, check, tokenise, pack. What training and inspection share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftjax.data.chat import tokenize_all
from ftjax.data.loader import Loader
from ftjax.data.sources import read_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
) -> tuple[Loader, dict]:
    """The loader of all rows of `entries` (see `sources.read_sources`), and `tokenize_all`'s report on them."""
    rows = read_sources(entries, max_bad_rows)
    examples, report = tokenize_all(rows, tokenizer, max_length, vocab_size=vocab_size)
    return Loader(examples, batch_size, max_length, packing, seed, shuffle), report
