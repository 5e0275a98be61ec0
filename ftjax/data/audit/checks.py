"""Checks of a data set before it is trained on: errors that would make training vain, and warnings to look at.

`Checks` is fed rows and examples in one pass, keeps a few bytes of each (hashes, lengths; signatures for near
duplicates), and then compares the rows with each other. Training runs `at_start`; `ftjax.inspect_data` runs all.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data.audit import duplicates, private
from ftjax.data.audit.findings import FINDING_KINDS, NEAR, SMALL_SHARE, Finding, Findings
from ftjax.data.audit.parts import Parts, near_text, parts, trained_text
from ftjax.data.format.conversation import unanswered
from ftjax.data.format.example import Document, Row

if TYPE_CHECKING:
    from ftjax.data.tokens.examples import Examples

START_ROWS = 50_000  # that `at_start` reads at most, evenly over the set
ALL_ROWS = 1_000  # up to which it reads all of them
MAX_MARKED = 200  # rows whose index is kept, for each code
_CHUNK = 512
_REFUSAL = re.compile("AI language model")


@dataclass(frozen=True)
class TokenFacts:
    """What the checks of tokens need to know.

    Attributes:
      ends: ids at which generation stops.
      bos, pad: ids, or None.
      max_length: where examples are cut.
      special: the special tokens as text. A tokenizer turns any text that holds one into the control token. Without
        those that are new to the model and that no chat template writes: rows teach them, so they stand there on
        purpose.
      marks: their ids.
      answered: whether rows hold what is trained (`kinds.RowKind`).
    """

    ends: frozenset[int]
    bos: int | None
    pad: int | None
    max_length: int
    special: frozenset[str] = frozenset()
    marks: frozenset[int] = frozenset()
    answered: bool = True

    @classmethod
    def of(
        cls, tokenizer, ends: Iterable[int], max_length: int, known_rows: int | None = None, answered: bool = True
    ) -> "TokenFacts":
        """known_rows: tokens from this id on are new to the model; None: none are."""
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        template = str(tokenizer.chat_template)
        new = {token.content for i, token in added.items() if known_rows is not None and i >= known_rows}
        special -= {token for token in new if token not in template}
        marks = frozenset(tokenizer.convert_tokens_to_ids(sorted(special)))
        ids = tokenizer.bos_token_id, tokenizer.pad_token_id
        return cls(frozenset(ends), *ids, max_length, frozenset(special), marks, answered)


@dataclass
class Side:
    """What is kept of the rows of training or evaluation to compare them. `origin(i)` is that of the i-th row added."""

    origin: Callable[[int], str]
    prompts: array = field(default_factory=lambda: array("Q"))  # hash of the prompt; 0 for rows without one
    answers: array = field(default_factory=lambda: array("Q"))  # of the answers
    contents: array = field(default_factory=lambda: array("Q"))  # of prompt, answers and verdicts, but for white space
    copies: array = field(default_factory=lambda: array("Q"))  # of all that training sees, white space included
    judged: list[tuple[int, int, bool]] = field(default_factory=list)  # (row, hash of prompt and answer, called good)
    signatures: duplicates.Signatures = field(default_factory=duplicates.Signatures)

    def __len__(self) -> int:
        return len(self.contents)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(np.array(hashes, np.uint64) for hashes in (self.prompts, self.answers, self.contents))

    def add(self, row: Row, own: Parts, near: bool) -> None:
        prompt = duplicates.word_hash(own.prompt) if own.prompt else 0
        answers = [duplicates.word_hash(answer) for answer in own.answers]
        for answer, good in zip(answers, own.verdicts):
            self.judged.append((len(self), duplicates.combined_hash(prompt, answer), good))
        self.prompts.append(prompt)
        self.answers.append(duplicates.combined_hash(*answers))
        self.contents.append(duplicates.combined_hash(prompt, *answers, *own.verdicts))
        # Python's own hash is quick, and differs between processes: these are only compared in this one.
        self.copies.append(hash(own) & 0xFFFFFFFFFFFFFFFF)
        if near:
            self.signatures.add(near_text(row.fields))


class Checks:
    """All checks over one pass. Call `rows` with all rows, `examples` with all examples, then `finish`.

    Args:
      facts: of the tokenizer and the cut.
      origins: {"train" or "eval": the origin of the i-th row added to that side}.
      near: also look for near duplicates; costs time and 512 bytes a row.
    """

    def __init__(self, facts: TokenFacts, origins: dict[str, Callable[[int], str]], near: bool = True):
        self._facts, self._near = facts, near
        self.sides = {name: Side(origin) for name, origin in origins.items()}
        self.findings = Findings()
        self.marked: dict[str, list[int]] = {}  # code -> indices of training rows, for findings between rows
        self.copies = self.near_copies = 0
        self._end_trained = False
        self._examples = 0
        longest_first = sorted(facts.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
        self._is_end = np.zeros(max([0, *facts.ends]) + 2, bool)  # the last entry stands for all ids beyond
        self._is_end[list(facts.ends)] = True
        self._other_marks = np.array(sorted(facts.marks - facts.ends), np.int64)

    def rows(self, rows: Sequence[Row], side: str = "train") -> list[tuple[str, int]]:
        """Checks the text of a chunk of rows; returns (code, index in the chunk) of faults within one row."""
        row_parts = [parts(row.fields) for row in rows]
        faults = []
        for i, (row, own) in enumerate(zip(rows, row_parts)):
            faults += [(code, i, "") for code in _malformed(row.fields, own)]
            self.sides[side].add(row, own, self._near)
        faults += self._text_faults(rows, ["\n".join((own.prompt, *own.answers)) for own in row_parts])
        details = {(code, i): detail for code, i, detail in reversed(faults)}  # a row counts once for each code
        for code, i in sorted(details, key=itemgetter(1)):
            self.findings.add(code, rows[i].origin, details[code, i])
        return list(details)

    def _text_faults(self, rows: Sequence[Row], texts: Sequence[str]) -> Iterator[tuple[str, int, str]]:
        """(code, index of the row, detail) of each fault in the rows' texts."""
        # All rows as one text: a search over it costs little more than a search over one row.
        text = "\n".join(texts)
        starts = np.cumsum([0, *(len(row_text) + 1 for row_text in texts)]).tolist()
        faults = [(f"private_{name}", offset, masked) for name, offset, masked in private.matches(text)]
        faults += [("garbled", offset, "") for offset in private.garbled(text)]
        faults += [("refusal", match.start(), "") for match in _REFUSAL.finditer(text)]
        faults += [("special_in_prompt", match.start(), match[0]) for match in self._special.finditer(text)]
        for code, offset, detail in faults:
            i = bisect_right(starts, offset) - 1
            if code == "special_in_prompt" and (learned := self._special.search(trained_text(rows[i].fields))):
                code, detail = "special_in_text", learned[0]
            yield code, i, detail

    def examples(
        self, examples: Sequence[Sequence[Document]], origin: Callable[[int], str], whole: bool = True
    ) -> list[tuple[str, int]]:
        """Checks the tokens of a chunk of examples, each given as its documents; returns (code, index in the chunk).

        Args:
          origin: of the i-th of them.
          whole: they are not cut yet, so what the cut will do to them is reported.
        """
        documents = [document for of_example in examples for document in of_example]
        counts = [len(of_example) for of_example in examples]
        owners = np.repeat(np.arange(len(examples)), counts)
        facts, faults = self._facts, []
        tokens = np.concatenate([document.tokens for document in documents])
        trained = np.concatenate([document.trained for document in documents])
        lengths = np.array([len(document.tokens) for document in documents])
        starts = np.cumsum(lengths) - lengths
        position = np.arange(len(tokens)) - np.repeat(starts, lengths)  # of each token in its document
        kept = trained & (position < facts.max_length)
        is_end = self._is_end[np.minimum(tokens, len(self._is_end) - 1)]
        # Of a pair the chosen answer comes first; the end of the rejected one is trained to be less likely.
        taught = np.repeat(np.diff(owners, prepend=-1) > 0, lengths)
        self._end_trained |= bool((kept & is_end & taught).any())
        self._examples += len(examples)

        def document_of(token: int) -> int:
            return int(np.searchsorted(starts, token, side="right")) - 1

        # An end token just after trained ones, itself not trained. After another end token it is decoration.
        inside = (position[1:] > 0) & (position[1:] < facts.max_length)
        masked = trained[:-1] & ~is_end[:-1] & ~trained[1:] & is_end[1:] & inside
        for token in (np.flatnonzero(masked) + 1).tolist():
            faults.append(("pad_is_end" if tokens[token] == facts.pad else "end_masked", document_of(token)))
        goes_on = np.append(trained[1:] & (position[1:] > 0), False)
        last = np.flatnonzero(trained & ~goes_on & (position < facts.max_length - 1))  # of an answer that is not cut
        faults += [("end_unknown", document_of(token)) for token in last[np.isin(tokens[last], self._other_marks)]]
        if facts.bos is not None:
            second = (position[1:] == 1) & (tokens[1:] == facts.bos) & (tokens[:-1] == facts.bos)
            faults += [("double_bos", document_of(token)) for token in np.flatnonzero(second) + 1]
        if whole:
            has_trained = np.logical_or.reduceat(kept, starts)
            faults += [("untrained", i) for i in np.flatnonzero(~has_trained).tolist() if facts.answered]
            faults += [("truncated", i) for i in np.flatnonzero(lengths > facts.max_length).tolist()]
        faults = list(dict.fromkeys((code, int(owners[i])) for code, i in faults))
        for code, i in faults:
            # Asking for an origin may read a row, so only those that will be shown are asked for.
            self.findings.add(code, origin(i) if self.findings.wants_place(code) else "")
        return faults

    def refused(self, message: str, origin: str, allowed: bool = False) -> None:
        """A row that reading or tokenizing refused with this message; a warning where such rows are allowed."""
        what = message.removeprefix(origin).removeprefix(":").strip()
        self.findings.add("skipped" if allowed else "refused", origin, what=what)

    def mixture(self, names: Sequence[str], shares: Sequence[float]) -> None:
        """Reports sources that give too small a share of an epoch."""
        for name, share in zip(names, shares):
            if share < SMALL_SHARE:
                self.findings.add("mixture", name, f"{share:.2%}")

    def finish(self) -> list[Finding]:
        """All findings, errors first, those between rows included."""
        if self._examples and not self._end_trained and self._facts.ends and self._facts.answered:
            self.findings.add("end_untrained")
        self._compare()
        sizes = {name: len(side) for name, side in self.sides.items()}
        return self.findings.all(sum(sizes.values()), sizes.get("eval", 0))

    def _compare(self) -> None:
        train = self.sides["train"]
        prompts, _, contents = train.arrays()
        rows = np.arange(len(train))
        first = duplicates.first_of_equal(np.array(train.copies, np.uint64))
        copies, originals = np.flatnonzero(first != rows), np.flatnonzero(first == rows)
        for i in copies.tolist():
            self._add_pair("duplicate", train, i, train, int(first[i]))
        self._contradictions(train, prompts, np.flatnonzero(duplicates.first_of_equal(contents) == rows))
        near = []
        signatures = train.signatures.take()
        if self._near and len(originals) > 1:
            # An exact copy is in the cluster of its original; it has been reported already, so only originals count.
            clusters = duplicates.clusters(len(train), duplicates.near_pairs(signatures, NEAR))
            near = originals[clusters[originals] != originals].tolist()
            for i in near:
                self._add_pair("near_duplicate", train, i, train, int(clusters[i]))
        self.copies, self.near_copies = len(copies), len(near)
        if "eval" in self.sides and len(self.sides["eval"]):
            self._leaks(train, self.sides["eval"], signatures)

    def _contradictions(self, train: Side, prompts: np.ndarray, unique: np.ndarray) -> None:
        """Rows with one prompt that disagree. unique: indices of the rows whose contents no earlier row has."""
        if train.judged:  # several pairs or labeled answers to a prompt are usual; that they disagree is not
            good = {key: row for row, key, verdict in train.judged if verdict}
            for row, key, verdict in train.judged:
                if not verdict and key in good and good[key] != row:
                    self._add_pair("contradicted_label", train, row, train, good[key])
            return
        asked = unique[prompts[unique] != 0]
        first = duplicates.first_of_equal(prompts[asked])
        for i in np.flatnonzero(first != np.arange(len(asked))).tolist():
            self._add_pair("contradiction", train, int(asked[i]), train, int(asked[first[i]]))

    def _leaks(self, train: Side, held: Side, signatures: np.ndarray) -> None:
        """Rows of the evaluation that are trained on: whole, with their prompt, or nearly. signatures: of `train`."""
        (prompts, answers, contents), (held_prompts, _, held_contents) = train.arrays(), held.arrays()
        same_row = duplicates.index_in(held_contents, contents)
        same_prompt = np.where(held_prompts != 0, duplicates.index_in(held_prompts, prompts), -1)
        first = duplicates.first_of_equal(prompts)
        several = np.zeros(len(train), bool)  # set for the first row of each trained prompt that has several answers
        several[first[answers != answers[first]]] = True
        near = np.full(len(held), -1)
        if self._near and len(train):
            for ours, theirs in duplicates.near_across(held.signatures.take(), signatures, NEAR):
                near[ours] = theirs
        for i in range(len(held)):
            prompt_code = "leak_sampled" if several[first[same_prompt[i]]] else "leak_prompt"
            for code, trained in (("leak", same_row[i]), (prompt_code, same_prompt[i]), ("leak_near", near[i])):
                if trained >= 0:
                    self._add_pair(code, held, i, train, int(trained))
                    break

    def _add_pair(self, code: str, side: Side, index: int, other: Side, other_index: int) -> None:
        if side is self.sides["train"] and len(self.marked.setdefault(code, [])) < MAX_MARKED:
            self.marked[code].append(index)
        if self.findings.wants_place(code):
            self.findings.add(code, side.origin(index), f"as {other.origin(other_index)}")
        else:
            self.findings.add(code)


def unusual_lengths(lengths: np.ndarray) -> np.ndarray:
    """Indices of lengths far from the others: more than six median deviations from the median, by their logarithm.

    Fewer than 50 lengths are too few to judge: no indices.
    """
    if len(lengths) < 50:
        return np.zeros(0, int)
    logs = np.log(np.maximum(lengths, 1))
    distance = np.abs(logs - np.median(logs))
    return np.flatnonzero(distance > max(6 * np.median(distance), np.log(4)))


def at_start(examples: "Examples", heldout: Sequence[Sequence[Row]], facts: TokenFacts) -> list[Finding]:
    """The checks that are cheap enough for the start of every run: all but near duplicates and unusual lengths.

    They cost less than 5 % of tokenizing the examples. Evenly spread over the set, the text of every third row is read
    again, but of no more than START_ROWS and of no fewer than ALL_ROWS; evaluation rows are read up to START_ROWS.

    Args:
      examples: those that are trained on, cut already.
      heldout: rows that are evaluated on.
    """
    rows = RowsOf(examples)
    picked = spread(len(rows), min(START_ROWS, max(ALL_ROWS, len(rows) // 3)))
    held = [(held_rows, i) for held_rows in heldout for i in spread(len(held_rows), START_ROWS).tolist()]
    origins = {"train": lambda i: rows[int(picked[i])].origin, "eval": lambda i: held[i][0][held[i][1]].origin}
    checks = Checks(facts, origins, near=False)
    without_answer = examples.report["unanswered"]  # of all rows
    for chunk in _chunks(picked.tolist()):
        faults = checks.rows([rows[i] for i in chunk])
        without_answer -= sum(code == "unanswered" for code, _ in faults)
    if without_answer > 0:
        checks.findings.add("unanswered", count=without_answer)
    for chunk in _chunks(held):
        checks.rows([held_rows[i] for held_rows, i in chunk], "eval")
    for chunk in _chunks(spread(len(examples), START_ROWS).tolist()):
        documents = [examples.documents_of(i) for i in chunk]
        checks.examples(documents, lambda i, chunk=chunk: examples.origin(chunk[i]), whole=False)
    if cut := examples.report["truncated"]:
        what = f"{cut:,} rows are {FINDING_KINDS['truncated'].what}"
        checks.findings.add("truncated", count=cut, what=what)
    if len(examples.weights) > 1:
        names = [source["source"] for source in examples.report["per_source"]]
        rows_given = np.bincount(examples.source_ids, minlength=len(examples.weights)) * np.array(examples.weights)
        checks.mixture(names, rows_given[: len(names)] / rows_given.sum())
    return checks.finish()


class RowsOf(Sequence[Row]):
    """The rows that examples were made of, each once, and read again when it is asked for."""

    def __init__(self, examples: "Examples"):
        self._examples = examples
        is_first = np.diff(examples.rows, prepend=-1) != 0  # the examples of a row that was split stand together
        if examples.part_ids is not None:
            is_first |= np.diff(examples.part_ids, prepend=examples.part_ids[:1]) != 0
        self._first = np.flatnonzero(is_first)

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, i: int) -> Row:
        return self._examples.row(int(self._first[i]))


def spread(count: int, most: int) -> np.ndarray:
    """int64: all indices below `count`, or `most` of them at even distances."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _chunks(items: Sequence) -> Iterable[Sequence]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def _malformed(fields: dict, own: Parts) -> Iterable[str]:
    """Codes of what is wrong with the structure of a row."""
    for name in ("messages", "completion", "chosen", "rejected"):
        turns = fields.get(name)
        if isinstance(turns, list):
            said = [turn for turn in turns if turn["role"] == "assistant" and not turn.get("tool_calls")]
            if not all(turn["content"].strip() for turn in said):
                yield "empty_turn"
    if not all(answer.strip() for answer in own.answers):
        yield "no_answer"
    if unanswered(fields):
        yield "unanswered"
    if len(own.answers) == 2 and duplicates.word_hash(own.answers[0]) == duplicates.word_hash(own.answers[1]):
        yield "same_pair"
