"""Checks of a data set before it is trained on: errors that would make training vain, and warnings to look at.

`Checks` is fed rows and examples in one pass, keeps a few bytes of each (hashes, lengths; signatures for near
duplicates), and says at the end what it found. `at_start` is what training runs; `ftjax.inspect_data` runs all.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ftjax.data.audit import duplicates, private
from ftjax.data.audit.findings import Finding, Findings
from ftjax.data.audit.kinds import KINDS, NEAR, SMALL_SHARE
from ftjax.data.audit.parts import own_text, parts, trained_text
from ftjax.data.format.example import Row

if TYPE_CHECKING:
    from ftjax.data.tokens.examples import Examples

START_ROWS = 50_000  # that `at_start` reads at most, evenly over the set
ALL_ROWS = 1_000  # up to which it reads all of them
_CHUNK = 512
_MARKED = 200
_REFUSAL = re.compile("AI language model")


@dataclass(frozen=True)
class TokenFacts:
    """What the checks of tokens need to know.

    Attributes:
      ends: ids at which generation stops.
      bos, pad: ids, or None.
      max_length: where examples are cut.
      special: the special tokens, as they are written. A tokenizer makes them of any text that holds them.
    """

    ends: frozenset[int]
    bos: int | None
    pad: int | None
    max_length: int
    special: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tokenizer, ends: Iterable[int], max_length: int) -> "TokenFacts":
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        return cls(frozenset(ends), tokenizer.bos_token_id, tokenizer.pad_token_id, max_length, frozenset(special))


@dataclass
class Side:
    """Rows of training or evaluation, as the comparisons need them. `origin(i)` names the i-th row that was added."""

    origin: Callable[[int], str]
    prompts: array = field(default_factory=lambda: array("Q"))  # hash of the prompt; 0 for rows without one
    answers: array = field(default_factory=lambda: array("Q"))  # of the answer
    wholes: array = field(default_factory=lambda: array("Q"))  # of all, the verdicts included
    copies: array = field(default_factory=lambda: array("Q"))  # of all as it stands
    judged: list[tuple[int, int, bool]] = field(default_factory=list)  # (row, hash of prompt and answer, called good)
    signatures: duplicates.Signatures = field(default_factory=duplicates.Signatures)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(np.array(one, np.uint64) for one in (self.prompts, self.answers, self.wholes))


class Checks:
    """All checks over one pass. Call `row` for every row, `example` for every example, then `finish`.

    Args:
      facts: of the tokenizer and the cut.
      origins: {"train" or "eval": the origin of the i-th row added to that side}.
      near: also look for near duplicates; costs time and 512 bytes a row.
    """

    def __init__(self, facts: TokenFacts, origins: dict[str, Callable[[int], str]], near: bool = True):
        self._facts, self._near = facts, near
        self.sides = {name: Side(origin) for name, origin in origins.items()}
        self.findings = Findings()
        self.marked: dict[str, list[int]] = {}  # code -> training rows, by their place, of what is between rows
        self.copies = self.near_copies = 0
        self._end_trained = False
        self._examples = 0
        longest_first = sorted(facts.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which nothing matches
        size = max([0, *facts.ends]) + 2
        self._is_end = np.zeros(size, bool)
        self._is_end[list(facts.ends)] = True

    def add(self, code: str, place: str = "", detail: str = "", count: int = 1, what: str = "") -> None:
        severity, usual, mend = KINDS[code]
        self.findings.add(severity, code, what or usual, mend, place, detail, count)

    def rows(self, rows: Sequence[Row], side: str = "train") -> list[tuple[str, int]]:
        """Checks what a chunk of rows says; returns (code, place in the chunk) of what is wrong with each alone."""
        into, found, texts = self.sides[side], [], []
        for which, row in enumerate(rows):
            own = parts(row.fields)
            found += [(code, which, "") for code in _wrong(row.fields, own)]
            texts.append("\n".join((own.prompt, *own.answers)))
            prompt = duplicates.key(own.prompt) if own.prompt else 0
            answers = [duplicates.key(answer) for answer in own.answers]
            for answer, good in zip(answers, own.verdicts):
                into.judged.append((len(into.wholes), duplicates.combined(prompt, answer), good))
            into.prompts.append(prompt)
            into.answers.append(duplicates.combined(*answers))
            into.wholes.append(duplicates.combined(prompt, *answers, *own.verdicts))
            into.copies.append(hash(own) & 0xFFFFFFFFFFFFFFFF)  # Python's own: quick, and compared in this process only
            if self._near:
                into.signatures.add(own_text(row.fields))
        # One text for all of them: a search costs little more than on one row.
        starts = np.cumsum([0, *(len(text) + 1 for text in texts)]).tolist()
        text = "\n".join(texts)
        at = [(f"private_{kind}", place, hidden) for kind, place, hidden in private.find(text)]
        at += [("garbled", place, "") for place in private.garbled(text)]
        at += [("refusal", match.start(), "") for match in _REFUSAL.finditer(text)]
        at += [("special_in_prompt", match.start(), match[0]) for match in self._special.finditer(text)]
        found += [(code, bisect_right(starts, place) - 1, detail) for code, place, detail in at]
        for i, (code, which, _) in enumerate(found):
            if code == "special_in_prompt" and (learned := self._special.search(trained_text(rows[which].fields))):
                found[i] = ("special_in_text", which, learned[0])
        unique = {(code, which): detail for code, which, detail in reversed(found)}  # a row counts once for each kind
        for code, which in sorted(unique, key=lambda one: one[1]):
            self.add(code, rows[which].origin, unique[code, which])
        return list(unique)

    def examples(
        self,
        documents: Sequence[tuple[np.ndarray, np.ndarray]],
        origin: Callable[[int], str],
        whole: bool = True,
    ) -> list[tuple[str, int]]:
        """Checks the tokens of a chunk of examples; returns (code, place in the chunk).

        Args:
          documents: (tokens, trained) of each, see `Example`.
          origin: of the i-th of them.
          whole: they are not cut yet, so that what the cut does to them can be told.
        """
        facts, found = self._facts, []
        tokens = np.concatenate([one for one, _ in documents])
        trained = np.concatenate([one for _, one in documents])
        lengths = np.array([len(one) for one, _ in documents])
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(tokens)) - np.repeat(starts, lengths)  # in its document
        kept = trained & (place < facts.max_length)
        is_end = self._is_end[np.minimum(tokens, len(self._is_end) - 1)]
        self._end_trained |= bool((kept & is_end).any())
        self._examples += len(documents)
        # An end token just after trained ones, itself not trained. After another end token it is decoration.
        masked = np.flatnonzero(trained[:-1] & ~is_end[:-1] & ~trained[1:] & is_end[1:] & (place[1:] > 0)) + 1
        for at in masked.tolist():
            which = int(np.searchsorted(starts, at, side="right")) - 1
            found.append(("pad_is_end" if tokens[at] == facts.pad else "end_masked", which))
        if facts.bos is not None:
            second = np.flatnonzero((place[1:] == 1) & (tokens[1:] == facts.bos) & (tokens[:-1] == facts.bos)) + 1
            found += [("double_bos", int(np.searchsorted(starts, at, side="right")) - 1) for at in second]
        if whole:
            some = np.logical_or.reduceat(kept, starts)
            found += [("untrained", which) for which in np.flatnonzero(~some).tolist()]
            found += [("truncated", which) for which in np.flatnonzero(lengths > facts.max_length).tolist()]
        found = list(dict.fromkeys(found))
        for code, which in found:
            if self.findings.wants_place(code, KINDS[code][1]):
                self.add(code, origin(which))
            else:
                self.add(code)
        return found

    def refused(self, message: str, origin: str, allowed: bool = False) -> None:
        """A row that reading or tokenizing refused, with the message that it gave; a warning where that is allowed."""
        what = message.removeprefix(origin).removeprefix(":").strip()
        self.add("skipped" if allowed else "refused", origin, what=what)

    def mixture(self, names: Sequence[str], shares: Sequence[float]) -> None:
        """Finds sources that give too small a share of an epoch."""
        for name, share in zip(names, shares):
            if share < SMALL_SHARE:
                self.add("mixture", name, f"{share:.2%}")

    def finish(self) -> list[Finding]:
        """What was found in the rows themselves and between them, errors first."""
        if self._examples and not self._end_trained and self._facts.ends:
            self.add("end_untrained")
        self._compare()
        return self.findings.all()

    def _compare(self) -> None:
        train = self.sides["train"]
        prompts, _, wholes = train.arrays()
        first = duplicates.first_of_equal(np.array(train.copies, np.uint64))
        copies = np.flatnonzero(first != np.arange(len(wholes)))
        for i in copies.tolist():
            self._pair("duplicate", train, i, train, int(first[i]))
        alone = np.flatnonzero(first == np.arange(len(wholes)))
        said = np.flatnonzero(duplicates.first_of_equal(wholes) == np.arange(len(wholes)))
        self._contradictions(train, prompts, said)
        near = np.zeros(len(wholes), bool)
        signatures = train.signatures.take()
        if self._near and len(alone) > 1:
            # Copies hang together with their first row; those are told already.
            parents = duplicates.clusters(len(wholes), duplicates.near_pairs(signatures, NEAR))
            for i in alone[parents[alone] != alone].tolist():
                near[i] = True
                self._pair("near_duplicate", train, i, train, int(parents[i]))
        self.copies, self.near_copies = len(copies), int(near.sum())
        if "eval" in self.sides and len(self.sides["eval"].wholes):
            self._leaks(train, self.sides["eval"], signatures)

    def _contradictions(self, train: Side, prompts: np.ndarray, alone: np.ndarray) -> None:
        if train.judged:  # many pairs or labeled answers to a prompt are usual; that they disagree is not
            good = {key: row for row, key, verdict in train.judged if verdict}
            for row, key, verdict in train.judged:
                if not verdict and key in good and good[key] != row:
                    self._pair("contradicted_label", train, row, train, good[key])
            return
        asked = alone[prompts[alone] != 0]
        first = duplicates.first_of_equal(prompts[asked])
        for i in np.flatnonzero(first != np.arange(len(asked))).tolist():
            self._pair("contradiction", train, int(asked[i]), train, int(asked[first[i]]))

    def _leaks(self, train: Side, held: Side, signatures: np.ndarray) -> None:
        (prompts, answers, wholes), (held_prompts, _, held_wholes) = train.arrays(), held.arrays()
        order = np.argsort(wholes, kind="stable")
        exact = _index_in(wholes, order, held_wholes)
        order = np.argsort(prompts, kind="stable")
        asked = np.where(held_prompts != 0, _index_in(prompts, order, held_prompts), -1)
        several = np.zeros(len(wholes), bool)  # trained prompts with several answers
        firsts = duplicates.first_of_equal(prompts)
        differs = answers != answers[firsts]
        several[firsts[differs]] = True
        near = np.full(len(exact), -1)
        if self._near and len(wholes):
            for ours, theirs in duplicates.near_across(held.signatures.take(), signatures, NEAR):
                near[ours] = theirs
        for i in range(len(exact)):
            prompt_code = "leak_sampled" if several[firsts[asked[i]]] else "leak_prompt"
            for code, at in (("leak", exact[i]), (prompt_code, asked[i]), ("leak_near", near[i])):
                if at >= 0:
                    self._pair(code, held, i, train, int(at))
                    break

    def _pair(self, code: str, side: Side, index: int, other: Side, other_index: int) -> None:
        if side is self.sides["train"] and len(self.marked.setdefault(code, [])) < _MARKED:
            self.marked[code].append(index)
        # Looking an origin up may read a row, so only for those that will be shown.
        if self.findings.wants_place(code, KINDS[code][1]):
            self.add(code, side.origin(index), f"as {other.origin(other_index)}")
        else:
            self.add(code)


def finding(code: str, what: str) -> Finding:
    """One finding about the whole set, in words of its own."""
    alone = Findings()
    severity, _, mend = KINDS[code]
    alone.add(severity, code, what, mend)
    return alone.all()[0]


def unusual_lengths(lengths: np.ndarray) -> np.ndarray:
    """Indices of lengths far from the others: more than six median deviations from the median, by their logarithm.

    None where there are fewer than 50, of which nothing can be said.
    """
    if len(lengths) < 50:
        return np.zeros(0, int)
    logs = np.log(np.maximum(lengths, 1))
    distance = np.abs(logs - np.median(logs))
    return np.flatnonzero(distance > max(6 * np.median(distance), np.log(4)))


def at_start(examples: "Examples", heldout: Sequence[Sequence[Row]], facts: TokenFacts) -> list[Finding]:
    """The checks that are cheap enough for the start of every run: all but near duplicates and unusual lengths.

    They cost less than 5 % of tokenizing the examples: the text of at most START_ROWS rows is read again, of more than
    ALL_ROWS every third one, evenly spread over the set; what is evaluated on is read up to START_ROWS.

    Args:
      examples: what is trained on, as it is cut.
      heldout: rows that are evaluated on.
    """
    rows = RowsOf(examples)
    picked = spread(len(rows), min(START_ROWS, max(ALL_ROWS, len(rows) // 3)))
    held = [(some, i) for some in heldout for i in spread(len(some), START_ROWS).tolist()]
    origins = {
        "train": lambda i: rows[int(picked[i])].origin,
        "eval": lambda i: held[i][0][held[i][1]].origin,
    }
    checks = Checks(facts, origins, near=False)
    for chunk in _chunks(picked.tolist()):
        checks.rows([rows[i] for i in chunk])
    for chunk in _chunks(held):
        checks.rows([some[i] for some, i in chunk], "eval")
    for chunk in _chunks(spread(len(examples), START_ROWS).tolist()):
        owners = [(i, document) for i in chunk for document in examples.documents_of(i)]
        documents = [document for _, document in owners]
        checks.examples(documents, lambda i, owners=owners: rows[owners[i][0]].origin, whole=False)
    if cut := examples.report["truncated"]:
        checks.add("truncated", count=cut, what=f"{cut:,} rows are {KINDS['truncated'][1]}")
    if len(examples.weights) > 1:
        names = [one["source"] for one in examples.report["per_source"]]
        given = np.bincount(examples.source_ids, minlength=len(examples.weights)) * np.array(examples.weights)
        checks.mixture(names, given[: len(names)] / given.sum())
    return checks.finish()


class RowsOf(Sequence[Row]):
    """The rows that examples were made of, read again when they are asked for."""

    def __init__(self, examples: "Examples"):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Row:
        examples = self._examples
        part = examples.parts[0 if examples.part_ids is None else examples.part_ids[i]]
        return part.rows[int(examples.rows[i])]


def spread(count: int, most: int) -> np.ndarray:
    """int64: all indices below `count`, or `most` of them at even distances."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _chunks(items: Sequence) -> Iterable[Sequence]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def _wrong(fields: dict, own) -> Iterable[str]:
    for name in ("messages", "completion", "chosen", "rejected"):
        turns = fields.get(name)
        if isinstance(turns, list):
            said = [m for m in turns if m["role"] == "assistant" and not m.get("tool_calls")]
            if any(not m.get("content") or (isinstance(m["content"], str) and m["content"].isspace()) for m in said):
                yield "empty_turn"
    if not all(answer.strip() for answer in own.answers):
        yield "no_answer"
    if len(own.answers) == 2 and duplicates.key(own.answers[0]) == duplicates.key(own.answers[1]):
        yield "same_pair"


def _index_in(keys: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 [len(wanted)]: where each stands in `keys`, -1 where it does not; `order` sorts `keys`."""
    if not len(keys):
        return np.full(len(wanted), -1)
    at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    return np.where(keys[order][at] == wanted, order[at], -1)
