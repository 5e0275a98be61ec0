"""Examples of the training rows in the prompt: the same ones for every question, or the nearest of each.

They stand before the question as earlier turns of its conversation, under its own system message; for a model without a
chat template as text. Training rows whose prompt is also a held-out question are never among them.
"""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.data.audit import parts
from ftjax.data.read.sources import read_sources
from ftjax.errors import SourceError, UserError
from ftjax.evals.scored import Question, question_of
from ftjax.prompts import Prompt

MOST = 20_000  # training rows that are looked at, drawn from all

_SYSTEM = ("system", "developer")


def training_questions(config: ConfigDict, heldout: Iterable[Question], seed: int = 0) -> list[Question]:
    """Training rows as questions with their answers, in an order that `seed` decides: the first k are the fixed ones.

    Left out: replayed sources, which are no examples of the task; text, rows with tools, rows that are bad or held out,
    and those that ask what `heldout` asks.
    """
    entries = [entry for entry in configs.sources(config, "train") if "replay" not in entry]
    rows = read_sources(entries, config.data.max_bad_rows, config.data.holdout)
    asked, found = {_key(question) for question in heldout}, []
    for i in np.random.default_rng(seed).permutation(len(rows))[:MOST]:
        try:
            row = rows.check(int(i))
        except SourceError:
            raise
        except UserError:  # training has counted it
            continue
        if row is None or "text" in row.fields or row.fields.get("tools"):
            continue
        question = question_of(row, rows.raw(int(i)))
        if question.expected and _key(question) not in asked:
            found.append(question)
    return found


def nearest(examples: Sequence[Question], questions: Sequence[Question], k: int) -> list[list[Question]]:
    """Of each question the k examples whose prompts have most in common with it, by BM25; the nearest one last.

    BM25 weighs words by how rare they are (Robertson and Zaragoza 2009); it is what retrieval is compared with.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each step

    def words(its: Sequence[Question]):
        return bm25s.tokenize([_text(question) for question in its], stopwords=None, show_progress=False)

    retriever = bm25s.BM25(backend="numpy")
    retriever.index(words(examples), show_progress=False)
    found, _ = retriever.retrieve(words(questions), k=k, show_progress=False, backend_selection="numpy")
    return [[examples[i] for i in row[::-1]] for row in found]


def with_examples(prompt: Prompt, examples: Sequence[Question], chat: bool) -> Prompt:
    """The prompt after the examples. chat: whether the model has a chat template."""
    if not examples:
        return prompt
    fields = prompt.fields
    if not chat and "prompt" in fields:
        before = "".join(f"{_text(its)}{its.expected}\n\n" for its in examples)
        return Prompt(prompt.origin, {"text": before + fields["prompt"]})
    turns = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
    system = [turn for turn in turns if turn["role"] in _SYSTEM]
    shown = [turn for its in examples for turn in its.example["messages"] if turn["role"] not in _SYSTEM]
    rest = [turn for turn in turns if turn["role"] not in _SYSTEM]
    return Prompt(prompt.origin, fields | {"messages": [*system, *shown, *rest]})


def _asked(question: Question) -> list[dict]:
    """The turns before the answer, without a system message."""
    turns = question.example["messages"][: -1 if question.has_answer else None]
    return [turn for turn in turns if turn["role"] not in _SYSTEM]


def _key(question: Question) -> str:
    """Equal where the same is asked, but for case and white space."""
    return " ".join(parts.conversation(_asked(question)).split()).casefold()


def _text(question: Question) -> str:
    """What is asked, as text."""
    return "\n".join(parts.content(turn) for turn in _asked(question))
