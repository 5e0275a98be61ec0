"""Heuristics of quality that know no language: repetition, symbols, bullets, words without letters.

The rules and limits are those of Gopher's filters (Rae et al. 2021, "Scaling Language Models", appendix A.1.1: all but
`words`, `stop words` and the paragraph rules) and C4's repeated sentences (Raffel et al. 2020, section 2.2) as
`repeated_sentences`. They were made for web pages; here they judge the answers of rows, but no answer of fewer than
MIN_WORDS words, so that "4" stays a good answer.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

MIN_WORDS = 20
_BULLETS = ("•", "●", "‣", "▪", "–", "-", "*")
_ELLIPSIS = ("...", "…")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s*")
# Scripts that put no spaces between words, for which rules that count words mean nothing.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

# name -> (the limit, "max" or "min", what it measures)
RULES: dict[str, tuple[float, str, str]] = {
    "repeated_lines": (0.30, "max", "share of the lines that occurred before"),
    "repeated_line_chars": (0.20, "max", "share of the characters in such lines"),
    "repeated_sentences": (0.30, "max", "share of the sentences that occurred before"),
    "top_2gram": (0.20, "max", "share of the characters in the commonest two words in a row"),
    "top_3gram": (0.18, "max", "the same of three words"),
    "top_4gram": (0.16, "max", "the same of four words"),
    "repeated_5gram": (0.15, "max", "share of the characters in five words in a row that occur more than once"),
    "repeated_10gram": (0.10, "max", "the same of ten words"),
    "mean_word_min": (3.0, "min", "mean length of a word"),
    "mean_word_max": (10.0, "max", "mean length of a word"),
    "symbols": (0.10, "max", "hash signs and ellipses for each word"),
    "bullet_lines": (0.90, "max", "share of the lines that start with a bullet"),
    "ellipsis_lines": (0.30, "max", "share of the lines that end with an ellipsis"),
    "letter_words": (0.80, "min", "share of the words that hold a letter"),
}


def faults(text: str, limits: dict[str, float]) -> list[tuple[str, float]]:
    """(rule, measured value) for each of the `limits` that the text breaks; [] for a text too short to be judged."""
    words = text.split()
    spaced = len(_UNSPACED.findall(text)) <= 0.3 * len(text)
    if len(words) < MIN_WORDS and (spaced or len(text) < 5 * MIN_WORDS):
        return []
    broken = []
    for name, limit in limits.items():
        measure, of_words = _MEASURES[name]
        if of_words and not spaced:
            continue
        value = measure(text, words)
        if value > limit if RULES[name][1] == "max" else value < limit:
            broken.append((name, value))
    return broken


def _lines(text: str) -> list[str]:
    return [line for line in (line.strip() for line in text.splitlines()) if line]


def _repeated(parts: Sequence[str]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _repeated_chars(parts: Sequence[str]) -> float:
    """Share of the characters that are in repetitions of an earlier part."""
    counts = Counter(parts)
    total = sum(map(len, parts))
    return sum((count - 1) * len(part) for part, count in counts.items()) / total if total else 0.0


def _top_ngram(words: Sequence[str], n: int) -> float:
    grams = Counter(zip(*(words[i:] for i in range(n))))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return count * sum(map(len, gram)) / sum(map(len, words)) if count > 1 else 0.0


def _repeated_ngrams(words: Sequence[str], n: int) -> float:
    """Share of the characters in n words in a row that occur more than once, each character counted once."""
    grams = list(zip(*(words[i:] for i in range(n))))
    counts = Counter(grams)
    covered = bytearray(len(words))
    for i, gram in enumerate(grams):
        if counts[gram] > 1:
            covered[i : i + n] = b"\x01" * n
    return sum(len(word) for word, inside in zip(words, covered) if inside) / sum(map(len, words)) if words else 0.0


def _share(parts: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, parts)) / len(parts) if parts else 0.0


def _mean_word(text: str, words: Sequence[str]) -> float:
    return sum(map(len, words)) / len(words)


# name -> (measure of (text, words), whether it needs words that are separated by spaces)
_MEASURES: dict[str, tuple[Callable[[str, Sequence[str]], float], bool]] = {
    "repeated_lines": (lambda text, words: _repeated(_lines(text)), False),
    "repeated_line_chars": (lambda text, words: _repeated_chars(_lines(text)), False),
    "repeated_sentences": (lambda text, words: _repeated([s for s in _SENTENCE.split(text) if s.strip()]), False),
    "top_2gram": (lambda text, words: _top_ngram(words, 2), True),
    "top_3gram": (lambda text, words: _top_ngram(words, 3), True),
    "top_4gram": (lambda text, words: _top_ngram(words, 4), True),
    "repeated_5gram": (lambda text, words: _repeated_ngrams(words, 5), True),
    "repeated_10gram": (lambda text, words: _repeated_ngrams(words, 10), True),
    "mean_word_min": (_mean_word, True),
    "mean_word_max": (_mean_word, True),
    "symbols": (lambda text, words: sum(map(text.count, ("#", *_ELLIPSIS))) / len(words), True),
    "bullet_lines": (lambda text, words: _share(_lines(text), lambda line: line.startswith(_BULLETS)), False),
    "ellipsis_lines": (lambda text, words: _share(_lines(text), lambda line: line.endswith(_ELLIPSIS)), False),
    "letter_words": (lambda text, words: _share(words, lambda word: any(map(str.isalpha, word))), True),
}
