"""Rows -> examples, in as many processes as pay, and kept in the cache for the next run.

The result does not depend on the number of processes: rows are cut into the same pieces, each is done by one function,
and what they hold is counted and written in the order of the rows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ftjax.data.read import cache
from ftjax.data.read.rows import BadRows, Rows, log_skipped
from ftjax.data.tokens import chat, examples, kinds, processes
from ftjax.data.tokens.examples import Examples, Part
from ftjax.errors import SourceError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 128  # rows
# Fewer rows are tokenized here and now, in less time than worker processes take to start, and not written anywhere.
MANY_ROWS = 4000
MAX_WORKERS = 32
_DECIDING = ("format", "read", "tokens")  # the wings whose code decides the tokens of a row


class TokenRules(NamedTuple):
    """What decides the tokens of a row, beside the tokenizer."""

    max_length: int  # of each document
    vocab_size: int | None
    train_on: str
    kind: str  # of ROW_KINDS


class Tokenized(NamedTuple):
    """What became of a range of rows.

    Attributes:
      stop: the end of the range.
      tokens: int32, of all examples one after the other, each flagged with `examples.TRAINED` where it is trained.
      rows, wholes, kept, trained: int64, of every row that was used: its index, the tokens of its longest document
        before the cut, those of all its documents after it, and how many of these are trained; 0 in `trained` for one
        that is dropped and not in `tokens`.
      lengths: int64, tokens of each document in `tokens`.
      dropped: the origins of the first of those.
      bad: rows that cannot be read, with what is wrong.
      failed: what is wrong with a row, or with the whole file, that stops the run; those after it are not done.
    """

    stop: int
    tokens: np.ndarray
    rows: np.ndarray
    wholes: np.ndarray
    kept: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    dropped: list[str]
    bad: list[tuple[int, str]]
    failed: str | None


def tokenize(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    *,
    vocab_size: int | None = None,
    train_on: str = "assistant",
    kind: str = "conversation",
    max_dropped: float = 0.05,
    workers: int | None = None,
    directory: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Examples:
    """The examples of all rows, each document cut at max_length from the right; rows with no trained token left are
    dropped.

    Its report holds ints: rows (those used), bad_rows (skipped), examples, truncated, dropped, tokens, trained_tokens,
    longest (document, before the cut); and `per_source`, a list of {"source", "rows", "bad_rows", "examples", "tokens",
    "trained_tokens"}.

    Args:
      kind: what a row is (`kinds.ROW_KINDS`).
      max_dropped: the share of the rows that may be dropped.
      workers: processes beside this one; 0 for none, None for as many as there are cores where there are MANY_ROWS.
      directory: of the cache; None for the usual one where there are MANY_ROWS, and no cache where there are fewer.
      progress: called with the number of rows done, now and then.

    Raises:
      UserError: no rows; a row that cannot be tokenized, the first of them; too many bad or dropped rows; a cache that
        cannot be written.
    """
    if max_length < 2:
        raise UserError(f"data.max_length = {max_length}: needs room for a token and its target; set it to 2 or more")
    if not len(rows):
        raise UserError("no rows to tokenize; name a data source that has some")
    rules = TokenRules(max_length, vocab_size, train_on, kind)
    many = len(rows) >= MANY_ROWS
    if workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS) if many else 0

    pieces = [range(start, min(start + PIECE, len(rows))) for start in range(0, len(rows), PIECE)]

    def build(append: Callable[[str, np.ndarray], None]) -> dict:
        with processes.ordered(_tokenize, (rows, tokenizer, rules), pieces, min(workers, len(pieces))) as done:
            return _collect(rows, done, max_length, max_dropped, append, progress)

    identity = _identity(tokenizer)
    if many or directory is not None:
        how = [identity, _backend(tokenizer), rules, max_dropped, _code()]
        found = examples.cached(directory or cache.directory("tokens"), _digest([rows.digest(), *how]), build)
    else:
        found = examples.in_memory(build)
    return Examples.of(
        found.arrays["lengths"].reshape(-1, kinds.ROW_KINDS[kind].documents),
        parts=(Part(found.arrays["tokens"], rows),),
        rows=found.arrays["rows"],
        source_ids=found.arrays["sources"],
        weights=tuple(rows.weights),
        digest=_digest([found.digest, identity]),
        report=_report(rows, found.header),
    )


def _tokenize(rows: Rows, tokenizer: "PreTrainedTokenizerFast", rules: TokenRules, piece: range) -> Tokenized:
    tokens, numbers, lengths, dropped, bad, failed = [], [], [], [], [], None
    for i in piece:
        try:
            row = rows.check(i)
        except SourceError as error:  # not a bad row: the file was changed, or is gone
            failed = str(error)
            break
        except UserError as error:
            bad.append((i, str(error)))
            continue
        if row is None:
            continue
        try:
            whole = kinds.ROW_KINDS[rules.kind].tokenize(row, tokenizer, rules.vocab_size, rules.train_on)
            example = kinds.cut(whole, rules.max_length, row.origin)
        except chat.NothingTrained:  # as its weights say: not bad, but of no use
            numbers.append((i, 0, 0, 0))
            if len(dropped) < 3:
                dropped.append(f"{row.origin} (weight 0)")
            continue
        except UserError as error:
            bad.append((i, str(error)))
            continue
        trained, longest = int(example.trained.sum()), max(len(document.tokens) for document in whole.values())
        numbers.append((i, longest, len(example.tokens), trained))
        if trained:
            tokens.append(np.where(example.trained, example.tokens | examples.TRAINED, example.tokens))
            lengths += example.lengths
        elif len(dropped) < 3:
            dropped.append(f"{row.origin} ({longest} tokens)")
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    columns = np.array(numbers, np.int64).reshape(-1, 4).T
    return Tokenized(piece.stop, flat, *columns, np.array(lengths, np.int64), dropped, bad, failed)


def _collect(rows: Rows, pieces: Iterator[Tokenized], max_length, max_dropped, append, progress) -> dict:
    """Writes the columns and returns the report (see `tokenize`) with the first bad row of each source, `first_bad`:
    [source, row, message without the origin before it]."""
    ends = np.cumsum([count for _, count in rows.per_source])
    names = ("rows", "bad_rows", "examples", "truncated", "dropped", "tokens", "trained_tokens")
    counts = {name: np.zeros(len(ends), np.int64) for name in names}
    bad_rows, first_bad, dropped, longest = BadRows(rows), {}, [], 0
    for piece in pieces:
        for i, message in piece.bad:
            bad_rows.skip(i, message)
            at = rows.source_of(i)
            counts["bad_rows"][at] += 1
            first_bad.setdefault(at, (at, i, message.removeprefix(rows.origin(i))))
        if piece.failed:
            raise UserError(piece.failed)
        sources = np.searchsorted(ends, piece.rows, side="right")
        kept = piece.trained > 0
        append("tokens", piece.tokens)
        append("lengths", piece.lengths)
        append("rows", piece.rows[kept])
        append("sources", sources[kept])
        every = np.ones(len(kept), np.int64)
        counted = (every, kept, piece.wholes > max_length, ~kept, piece.kept * kept, piece.trained)
        for name, values in zip(("rows", *names[2:]), counted, strict=True):
            counts[name] += np.bincount(sources, values, len(ends)).astype(np.int64)  # float64, exact below 2^53
        dropped = (dropped + piece.dropped)[:3]
        longest = max(longest, int(piece.wholes.max(initial=0)))
        progress(piece.stop)
    bad_rows.refuse(counts["rows"])
    report = {name: int(count.sum()) for name, count in counts.items()} | {"longest": longest}
    if report["dropped"] > max_dropped * report["rows"] or not report["examples"]:
        raise UserError(
            f"{report['dropped']} of {report['rows']} rows have no trained token within max_length = {max_length} (at "
            f"most {max_dropped:.0%} may be dropped), for example {', '.join(dropped)}; raise data.max_length "
            f"(the longest row has {longest} tokens), shorten the prompts or remove the rows"
        )
    shown = [
        {"source": name} | {key: int(counts[key][at]) for key in names} for at, (name, _) in enumerate(rows.per_source)
    ]
    return report | {"per_source": shown, "first_bad": list(first_bad.values())}


def _report(rows: Rows, header: dict) -> dict:
    """The report as `_collect` made it, now or for an earlier run, under the names that the sources have now; logs what
    was skipped."""
    report = {name: value for name, value in header.items() if name != "first_bad"}
    report["per_source"] = [
        counted | {"source": name} for counted, (name, _) in zip(report["per_source"], rows.per_source, strict=True)
    ]
    bad = {at: (report["per_source"][at]["bad_rows"], f"{rows.origin(i)}{rest}") for at, i, rest in header["first_bad"]}
    log_skipped(rows, [one["rows"] for one in report["per_source"]], bad)
    return report


def _identity(tokenizer: "PreTrainedTokenizerFast") -> list:
    """What a run must not change, in a form that no release of a library changes."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [_digest(vocabulary), tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _backend(tokenizer: "PreTrainedTokenizerFast") -> list:
    """What else decides the tokens: all of tokenizer.json but for cutting and padding, which are not used here."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: part for name, part in whole.items() if name not in ("truncation", "padding")}
    return [type(tokenizer).__name__, _digest(parts), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]


def _code() -> list:
    """The code that decides tokens: ours as it stands (how rows are read, checked and tokenized), other packages by
    version."""
    data = Path(__file__).parents[1]
    own = [path.read_text(encoding="utf-8") for wing in _DECIDING for path in sorted((data / wing).glob("*.py"))]
    return [_digest(own), *(metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy"))]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
