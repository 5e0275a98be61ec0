"""How alike two texts are, a number from 0 to 1, by the names that OpenAI's graders have for it."""

import collections
import functools
from collections.abc import Callable, Sequence

from ftjax.errors import UserError
from ftjax.evals.text_scores import of_extra

_LONGEST = 4  # n-grams of BLEU and GLEU


def fuzzy_match(text: str, reference: str) -> float:
    """Twice the length of the longest common subsequence of characters, over both lengths (`ratio` of RapidFuzz)."""
    if not text and not reference:
        return 1.0
    # Bit-parallel (Hyyro 2004): a zero bit of `rows` is a step of the subsequence.
    masks: dict[str, int] = collections.defaultdict(int)
    for place, character in enumerate(reference):
        masks[character] |= 1 << place
    rows = full = (1 << len(reference)) - 1
    for character in text:
        matched = rows & masks[character]
        rows = ((rows + matched) | (rows - matched)) & full
    common = len(reference) - rows.bit_count()
    return 2 * common / (len(text) + len(reference))


def bleu(text: str, reference: str) -> float:
    """BLEU of a sentence (Papineni et al. 2002), by `sacrebleu`, of the n-grams that the text is long enough for."""
    return _bleu_scorer().sentence_score(text, [reference]).score / 100


def gleu(text: str, reference: str) -> float:
    """Google's BLEU of a sentence (Wu et al. 2016, section 5): common n-grams over those of the longer text."""
    ours, theirs = _ngrams(text.split()), _ngrams(reference.split())
    most = max(ours.total(), theirs.total())
    return (ours & theirs).total() / most if most else 0.0


def rouge(kind: str) -> Callable[[str, str], float]:
    """ROUGE (Lin 2004), by `rouge-score`: the F1 of n-grams (rouge1 and on) or of the common subsequence (rougeL)."""
    return lambda text, reference: float(_rouge_scorer(kind).score(reference, text)[kind].fmeasure)


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": rouge(f"rouge{n}") for n in range(1, 6)},
    "rouge_l": rouge("rougeL"),
}
_REFUSED = {"cosine": "a model of embeddings", "meteor": "WordNet"}


def check(metric: str) -> None:
    """UserError where there is no such metric here, with what it would need."""
    if metric in _REFUSED:
        raise UserError(
            f"evaluation_metric {metric!r} needs {_REFUSED[metric]} and is not served; use one of {_known()}"
        )
    if metric not in METRICS:
        raise UserError(f"there is no evaluation_metric {metric!r}; use one of {_known()}")


def _known() -> str:
    return ", ".join(METRICS)


def _ngrams(words: Sequence[str]) -> collections.Counter:
    return collections.Counter(
        tuple(words[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1)
    )


@functools.cache
def _rouge_scorer(kind: str) -> object:
    def scorer():
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([kind])

    return of_extra("rouge_l", scorer)


@functools.cache
def _bleu_scorer() -> object:
    def scorer():
        from sacrebleu.metrics import BLEU

        return BLEU(effective_order=True)

    return of_extra("bleu", scorer)
