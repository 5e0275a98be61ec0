"""Scores that compare a completion with the expected answer as text; each is a number from 0 to 1."""

import collections
import functools
import re
import string
from collections.abc import Callable

from ftjax.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def expected(example: dict) -> str:
    """The answer that a row gives."""
    return example["messages"][-1]["content"]


def exact(completion: str, example: dict) -> float:
    """1.0 where the completion is the expected answer, but for white space around it."""
    return float(completion.strip() == expected(example).strip())


def f1(completion: str, example: dict) -> float:
    """The F1 of words, as SQuAD measures it (Rajpurkar et al. 2016, section 6.1, and its `evaluate-v1.1.py`).

    Letter case, ASCII punctuation and the English articles do not count, nor does the order of the words.
    """
    ours, theirs = _words(completion), _words(expected(example))
    if not ours or not theirs:
        return float(ours == theirs)  # as SQuAD 2.0 does, where no answer may be the right one
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(completion: str, example: dict) -> float:
    """ROUGE-L (Lin 2004, section 3): the F1 of the longest common subsequence of words, by `rouge-score`.

    Words are runs of the letters a to z and digits, in lower case and not stemmed.
    """
    return float(_rouge_scorer().score(expected(example), completion)["rougeL"].fmeasure)


def chrf(completion: str, example: dict) -> float:
    """chrF2 (Popovic 2015), by `sacrebleu`: the F-score of character n-grams, which suits any language."""
    return _chrf_scorer().sentence_score(completion, [expected(example)]).score / 100


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


@functools.cache
def _rouge_scorer() -> object:
    def scorer():
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"])

    return of_extra("rouge_l", scorer)


@functools.cache
def _chrf_scorer() -> object:
    def scorer():
        from sacrebleu.metrics import CHRF

        return CHRF()

    return of_extra("chrf", scorer)


def of_extra(score: str, make: Callable[[], object]) -> object:
    """What `make` returns; UserError with the fix where a package that it imports is missing."""
    try:
        return make()
    except ImportError as error:
        raise UserError(
            f"the score {score!r} needs a further package; pip install 'ftjax[scores]' ({error})"
        ) from error
