"""Rows -> examples, in as many processes as pay off, cached for the next run.

The result does not depend on the number of processes: the rows are always divided into the same chunks, and the chunks
are counted and written in the order of the rows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ftjax import cache
from ftjax.data.read.rows import BadRows, Rows, log_skipped
from ftjax.data.tokens import examples, kinds, pictured, processes
from ftjax.data.tokens.examples import Append, Examples, Part
from ftjax.data.tokens.outcome import TokenRules, outcome
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import SourceError, UserError

CHUNK = 128  # rows that a process tokenizes at a time
# Fewer rows are tokenized in this process, in less time than worker processes take to start, and are not cached.
MANY_ROWS = 4000
MAX_WORKERS = 32
_DECIDING = ("format", "images", "read", "tokens")  # the wings whose code decides the tokens of a row

Progress = Callable[[int], None]  # called with the number of rows done


class Tokenized(NamedTuple):
    """The result of one chunk of rows, of which n are good; those with no trained token are dropped."""

    stop: int  # the end of the chunk
    tokens: np.ndarray  # int32: of all examples one after the other, trained ones flagged with `examples.TRAINED`
    labels: np.ndarray  # float32: of these tokens, or of size 0
    rows: np.ndarray  # int64 [n]: the index of each good row
    longest: np.ndarray  # int64 [n]: the tokens of its longest document before the cut
    split: np.ndarray  # int64 [n]: whether each of its answers is an example
    examples: np.ndarray  # int64 [n]: how many examples it gives: 0 where it is dropped
    further: np.ndarray  # int64 [n]: how many of these a long text goes on in
    unanswered: np.ndarray  # int64 [n]: whether it ends in a turn that nothing answers
    kept: np.ndarray  # int64 [n]: the tokens of its examples
    trained: np.ndarray  # int64 [n]: how many of these are trained
    lengths: np.ndarray  # int64: the tokens of each document in `tokens`
    pictures: np.ndarray  # uint64: of each example `Pictures.digest`, or of size 0
    dropped: list[str]  # the origins of the first dropped rows
    bad: list[tuple[int, str]]  # the index of each bad row, and what is wrong with it
    failed: str | None  # an error that stops the run, such as a changed file; the rows after it are not tokenized


def tokenize(
    rows: Rows,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    vocab_size: int | None = None,
    train_on: str = "assistant",
    kind: str = "conversation",
    long_text: str = "divide",
    settings: kinds.Settings = kinds.PLAIN,
    max_dropped: float = 0.05,
    workers: int | None = None,
    directory: Path | None = None,
    progress: Progress = lambda done: None,
) -> Examples:
    """The examples of all rows. Each document is cut to its first max_length tokens; a row with no trained token left
    is dropped.

    The report of the examples holds ints: rows (those used), bad_rows (skipped), examples, split (rows of which each
    answer is an example), truncated (rows), divided (texts that are several examples), further (examples that these go
    on in), dropped (rows), unanswered (rows that end in a turn that nothing answers), tokens, trained_tokens, longest
    (document, before the cut); and `per_source`, a list of the same with "source".

    Args:
      kind: what a row is (`kinds.ROW_KINDS`).
      long_text: "divide": a text of more than max_length tokens goes on in further examples; "cut": it does not.
      max_dropped: the share of the rows that may be dropped.
      workers: processes besides this one. None: one per core if there are MANY_ROWS, else 0.
      directory: where to cache the result. None: in the usual directory if there are MANY_ROWS, else nowhere.
      progress: called with the number of rows done, now and then.

    Raises:
      UserError: no rows; the first row that cannot be tokenized; too many bad or dropped rows; a cache that cannot be
        written.
    """
    if max_length < 2:
        raise UserError(f"data.max_length = {max_length}: needs room for a token and its target; set it to 2 or more")
    if not len(rows):
        raise UserError("no rows to tokenize; name a data source that has some")
    if settings.images:
        pictured.check_tokenizer(settings.images, tokenizer)
    rules = TokenRules(max_length, vocab_size, train_on, kind, long_text, settings)
    many = len(rows) >= MANY_ROWS
    if workers is None:
        workers = min(os.cpu_count() or 1, MAX_WORKERS) if many else 0

    chunks = [range(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]

    def build(append: Append) -> dict:
        with processes.ordered(_tokenize, (rows, tokenizer, rules), chunks, min(workers, len(chunks))) as done:
            return _collect(rows, done, rules, max_dropped, append, progress)

    identity = _identity(tokenizer)
    if many or directory is not None:
        how = [identity, _backend(tokenizer), rules, max_dropped, _code()]
        if settings.images:
            with processes.ordered(pictured.stamps, (rows,), chunks, min(workers, len(chunks))) as stamps:
                how.append(list(stamps))
        columns = examples.cached(directory or cache.directory("tokens"), _digest([rows.digest(), *how]), build)
    else:
        columns = examples.in_memory(build)
    return Examples.of(
        columns.arrays["lengths"].reshape(-1, kinds.ROW_KINDS[kind].documents),
        parts=(Part(columns.arrays["tokens"], columns.arrays["labels"], rows),),
        rows=columns.arrays["rows"],
        source_ids=columns.arrays["sources"],
        weights=tuple(rows.weights([source["trained_tokens"] for source in columns.header["per_source"]])),
        replayed=tuple(source.replay > 0 for source in rows.sources),
        digest=_digest([columns.digest, identity, *([settings.images] if settings.images else [])]),
        images=settings.images,
        pictures=columns.arrays["pictures"],
        report=_report(rows, columns.header),
    )


def _tokenize(rows: Rows, tokenizer: Tokenizer, rules: TokenRules, chunk: range) -> Tokenized:
    tokens, labels, counts, lengths, pictures, dropped, bad, failed = [], [], [], [], [], [], [], None
    for i in chunk:
        try:
            found = outcome(rows, i, tokenizer, rules)
        except SourceError as error:  # not a bad row: the file was changed, or is gone
            failed = str(error)
            break
        if found is None:
            continue
        if found.bad:
            bad.append((i, found.bad))
            continue
        if found.dropped:
            dropped.append(f"{found.row.origin} ({found.dropped})")
        sizes = [(len(example.tokens), int(example.trained.sum())) for example in found.examples]
        kept, trained = (sum(column) for column in zip((0, 0), *sizes))
        further = found.divided and len(sizes) - 1
        counts.append((i, found.longest, found.split, len(sizes), further, found.unanswered, kept, trained))
        for example in found.examples:
            tokens.append(np.where(example.trained, example.tokens | examples.TRAINED, example.tokens))
            labels += [] if example.labels is None else [example.labels]
            lengths += example.lengths
            pictures += [found.pictures.digest] if rules.settings.images else []
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    flat_labels = np.concatenate(labels) if labels else np.zeros(0, np.float32)
    columns = np.array(counts, np.int64).reshape(-1, 8).T
    others = np.array(lengths, np.int64), np.array(pictures, np.uint64)
    return Tokenized(chunk.stop, flat, flat_labels, *columns, *others, dropped[:3], bad, failed)


def _collect(
    rows: Rows, chunks: Iterator[Tokenized], rules: TokenRules, max_dropped: float, append: Append, progress: Progress
) -> dict:
    """Appends the columns of all chunks. Returns the report of `tokenize`, and in it `first_bad`: for the first bad row
    of each source [index of the source, index of the row, message without the row's origin]."""
    ends = np.cumsum([count for _, count in rows.per_source])
    names = ("rows", "bad_rows", "examples", "split", "truncated", "divided", "further", "dropped")
    names += ("unanswered", "tokens", "trained_tokens")
    counts = {name: np.zeros(len(ends), np.int64) for name in names}
    bad_rows, first_bad, dropped, longest = BadRows(rows), {}, [], 0
    for chunk in chunks:
        for i, message in chunk.bad:
            bad_rows.skip(i, message)
            source = rows.source_of(i)
            counts["bad_rows"][source] += 1
            first_bad.setdefault(source, (source, i, message.removeprefix(rows.origin(i))))
        if chunk.failed:
            raise UserError(chunk.failed)
        sources = np.searchsorted(ends, chunk.rows, side="right")
        append("tokens", chunk.tokens)
        append("labels", chunk.labels)
        append("lengths", chunk.lengths)
        append("pictures", chunk.pictures)
        append("rows", np.repeat(chunk.rows, chunk.examples))
        append("sources", np.repeat(sources, chunk.examples))
        every, left_out = np.ones(len(sources), np.int64), chunk.examples == 0
        divided = chunk.further > 0
        truncated = (chunk.longest > rules.max_length) & ~divided
        counted = (every, chunk.examples, chunk.split, truncated, divided, chunk.further, left_out)
        counted += (chunk.unanswered * ~left_out, chunk.kept, chunk.trained)
        for name, values in zip(("rows", *names[2:]), counted, strict=True):
            counts[name] += np.bincount(sources, values, len(ends)).astype(np.int64)  # float64, exact below 2^53
        dropped = (dropped + chunk.dropped)[:3]
        longest = max(longest, int(chunk.longest.max(initial=0)))
        progress(chunk.stop)
    bad_rows.refuse(counts["rows"])
    report = {name: int(count.sum()) for name, count in counts.items()} | {"longest": longest}
    if report["dropped"] > max_dropped * report["rows"] or not report["examples"]:
        images = rules.settings.images
        smaller = "make images smaller with data.max_pixels, " if images and images.kind == "grid" else ""
        raise UserError(
            f"{report['dropped']} of {report['rows']} rows have {rules.lacking} (at most {max_dropped:.0%} may be "
            f"dropped), for example {', '.join(dropped)}; raise data.max_length "
            f"(the longest row has {longest} tokens), {smaller}shorten the prompts or remove the rows"
        )
    per_source = [
        {"source": name} | {key: int(counts[key][source]) for key in names}
        for source, (name, _) in enumerate(rows.per_source)
    ]
    return report | {"per_source": per_source, "first_bad": list(first_bad.values())}


def _report(rows: Rows, header: dict) -> dict:
    """Logs skipped rows. Returns the report of `_collect`, from now or an earlier run, with the sources' new names."""
    report = {name: value for name, value in header.items() if name != "first_bad"}
    report["per_source"] = per_source = [
        counts | {"source": name} for counts, (name, _) in zip(report["per_source"], rows.per_source, strict=True)
    ]
    bad = {source: (per_source[source]["bad_rows"], rows.origin(i) + rest) for source, i, rest in header["first_bad"]}
    log_skipped(rows, [counts["rows"] for counts in per_source], bad)
    return report


def _identity(tokenizer: Tokenizer) -> list:
    """What must stay the same when a run goes on, in a form that does not depend on any library's version."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [_digest(vocabulary), tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _backend(tokenizer: Tokenizer) -> list:
    """What else decides the tokens: all of tokenizer.json but truncation and padding, which are not used here."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: part for name, part in content.items() if name not in ("truncation", "padding")}
    return [type(tokenizer).__name__, _digest(parts), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]


def _code() -> list:
    """The code that decides tokens: our own source that reads, checks and tokenizes rows, other packages' versions."""
    data = Path(__file__).parents[1]
    own = [path.read_text(encoding="utf-8") for wing in _DECIDING for path in sorted((data / wing).glob("*.py"))]
    return [_digest(own), *(metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy"))]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
