"""Questions with choices: the answer is the choice that the model finds likeliest, so nothing is generated.

A choice is measured as what follows "Question: ...\\nAnswer:", as the harness of Gao et al. 2021 has it for such sets.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.masks import encode
from ftjax.data.tokens.rendering import Tokenizer
from ftjax.errors import UserError
from ftjax.evals.general import FOLDER
from ftjax.evals.likelihood import Item, Likelihood, Tokens, log_likelihoods
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

SHIPPED = {"source": str(FOLDER / "questions.jsonl")}  # 60 of knowledge, arithmetic, common sense and reading


class Question(NamedTuple):
    """One question.

    Attributes:
      text: what is asked.
      choices: at least two.
      answer: the index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


class Chosen(NamedTuple):
    """Which choice a model finds likeliest, int [questions] each, and its log-probabilities.

    Attributes:
      by_sum: by log p of the whole choice.
      by_bytes: by log p per byte of the choice in UTF-8, which does not favor short ones.
      likelihoods: of each question those of its choices.
    """

    by_sum: np.ndarray
    by_bytes: np.ndarray
    likelihoods: list[list[Likelihood]]


def read(entries: Iterable[dict[str, Any]]) -> list[Question]:
    """The questions of sources, each an entry as `config.source_entry` gives it; see `question_of` for their rows."""
    rows = read_sources(entries)
    return [question_of(rows.raw(i), rows.origin(i)) for i in range(len(rows))]


def question_of(fields: dict, origin: str) -> Question:
    """The question of a row with `question`, `choices` and `answer` (or `answerKey`).

    choices: a list of strings, or {"text": such a list, "label": their labels} as in ARC. answer: the index from 0, the
    label where there are labels, a letter from A on where there are none, or the text of a choice.

    Raises:
      UserError: with the origin; a field is missing, or the answer is none of the choices.
    """
    choices, answer = fields.get("choices"), fields.get("answer", fields.get("answerKey"))
    labels = None
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    strings = isinstance(choices, list | tuple) and all(isinstance(choice, str) and choice for choice in choices)
    if not isinstance(fields.get("question"), str) or not strings or len(choices) < 2 or answer is None:
        raise UserError(
            f"{origin}: a question with choices has `question`, a string, `choices`, a list of two strings or more, "
            f"and `answer`, the index from 0 or the label of the right one; this row has {sorted(map(str, fields))}"
        )
    labels = [str(label) for label in labels] if labels else [chr(ord("A") + i) for i in range(len(choices))]
    index = answer if type(answer) is int and not isinstance(fields["choices"], dict) else None
    if index is None:
        known = [names.index(str(answer)) for names in (labels, list(choices)) if str(answer) in names]
        index = known[0] if known else int(answer) if str(answer).isdecimal() else -1
    if not 0 <= index < len(choices):
        raise UserError(f"{origin}: the answer {answer!r} is none of the {len(choices)} choices, which count from 0")
    return Question(fields["question"], tuple(choices), index)


def choose(
    model: Decoder,
    variables: Tree,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    on_progress: Callable[[int, int], None] | None = None,
) -> Chosen:
    """What the model chooses; the arguments are those of `likelihood.log_likelihoods`."""
    items = [item for question in questions for item in _items(question, tokenizer)]
    found = iter(log_likelihoods(model, variables, items, on_progress))
    likelihoods = [[next(found) for _ in question.choices] for question in questions]
    by_sum, by_bytes = [], []
    for question, its in zip(questions, likelihoods, strict=True):
        totals = np.array([one.total for one in its])
        by_sum.append(int(totals.argmax()))
        by_bytes.append(int((totals / [len(choice.encode()) for choice in question.choices]).argmax()))
    return Chosen(np.array(by_sum), np.array(by_bytes), likelihoods)


def split(before: str, after: str, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """(context, continuation) in token ids, of the whole text tokenized at once; blanks between belong to `after`.

    Where a token spans the border it belongs to the continuation.
    """
    stripped = before.rstrip()
    before, after = stripped, before[len(stripped) :] + after
    whole, context = encode([before + after, before], tokenizer, add_special_tokens=True)
    shared = 0
    while shared < min(len(context), len(whole) - 1) and whole[shared] == context[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _items(question: Question, tokenizer: Tokenizer) -> list[Item]:
    before = f"Question: {question.text}\nAnswer:"
    return [Item(*split(before, f" {choice}", tokenizer)) for choice in question.choices]
