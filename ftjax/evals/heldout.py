"""What contestants are compared on: scored questions, and rows that have only a loss; a sample of large sets."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import assemble, sharding
from ftjax import config as configs
from ftjax.assemble import Base
from ftjax.data import pipeline
from ftjax.data.batch import packing
from ftjax.data.tokens.examples import Examples
from ftjax.evals import formats
from ftjax.evals.entries import likely_entries, split_entries
from ftjax.evals.likelihood import TOKENS, placed, row_length
from ftjax.evals.scored import Question, question_of, scored_sets
from ftjax.method import method_of
from ftjax.models.decoder import Decoder
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.training.display import Display
from ftjax.tree import Tree

LOSS = "loss"  # the metric of rows without a score
ROWS = "held-out rows"  # their name


class HeldOut(NamedTuple):
    """The examples of one set.

    Attributes:
      metric: the name of the score, or LOSS.
      questions: what is answered; of LOSS maybe fewer than rows, since text asks nothing.
      grade: (completion, question) -> score; None without one.
      valid: (completion, question) -> whether it has the form that is wanted; None where none is known.
      form: that form, in words; "" where the score knows it, or none is known.
      rows: (the examples, the indices of those that are used), where there is a loss.
    """

    name: str
    metric: str
    questions: Sequence[Question]
    grade: Callable[[str, Question], float] | None
    valid: Callable[[str, Question], bool] | None
    form: str = ""
    rows: tuple[Examples, np.ndarray] | None = None

    @property
    def examples(self) -> int:
        return len(self.questions) if self.rows is None else len(self.rows[1])


def held_out(config: ConfigDict, base: Base, limit: int, display: Display) -> list[HeldOut]:
    """Everything in data.eval and data.holdout that can be compared. limit: examples of each set at most; 0: all."""
    sets = []
    for its in scored_sets(config):
        questions = [its.questions[i] for i in _sample(len(its.questions), limit)]
        valid = its.how.valid and (lambda text, question, how=its.how: how.valid(text, question.example))
        sets.append(HeldOut(its.name, its.score, questions, its.grade, valid))
    for entry in likely_entries(config):
        display.say(f"{entry['source']} is left out: its {entry['score']} is measured in training (metrics.jsonl)")
    entries, train = split_entries(config)[1], configs.sources(config, "train")
    if not entries and not config.data.holdout:
        return sets
    if method_of(config).rows != "conversation":
        display.say("rows without a score are left out: here they are preferences, whose loss is no measure of answers")
        return sets
    spec = assemble.data_spec(config, base.model.spec, images=base.images)
    loader = pipeline.load_heldout(entries, train, base.tokenizer, spec, display.counter)
    used = _sample(len(loader.examples), limit)
    rows = [loader.examples.row(int(i)) for i in used]
    questions = [question_of(row, row.fields) for row in rows if "text" not in row.fields]
    return [*sets, HeldOut(ROWS, LOSS, questions, None, None, rows=(loader.examples, used))]


def with_form(held: HeldOut, training: Sequence[Question]) -> HeldOut:
    """With the form of training answers as what is valid, where they have one, and all held-out answers have it too."""
    form = formats.of_answers([question.expected for question in training])
    answers = [question.expected for question in held.questions if question.has_answer]
    if held.valid is not None or form is None or not all(map(form.matches, answers)):
        return held
    return held._replace(valid=lambda text, question: form.matches(text), form=form.name)


def _sample(count: int, limit: int) -> np.ndarray:
    """Indices of `limit` of them, drawn from one seed, rising; of all where there are no more."""
    if not limit or count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def losses(
    model: Decoder, variables: Tree, rows: tuple[Examples, np.ndarray], on_progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """(the summed cross-entropy of the trained tokens in nats, how many they are), float64 [n] each, of every row.

    Rows have few lengths, and batches as many tokens whatever these are. On the mesh of `jax.set_mesh`.
    """
    examples, used = rows
    mesh = jax.sharding.get_mesh()
    lengths = [row_length(examples.lengths[i], model.spec.max_position_embeddings, mesh) for i in used]
    sums, tokens, done = np.zeros(len(used)), np.zeros(len(used)), 0
    for length in sorted(set(lengths)):
        places = np.flatnonzero(np.asarray(lengths) == length)
        size = max(TOKENS // length, 1) * sharding.row_parts(mesh)
        for first in range(0, len(places), size):
            part = places[first : first + size]
            chosen = [used[place : place + 1] for place in part] + [used[:0]] * (size - len(part))
            batch = packing.fill(examples, chosen, length)
            sums[part] = np.asarray(_sums(model, variables, placed(batch)), np.float64)[: len(part)]
            tokens[part] = batch["weights"].sum(-1)[: len(part)]
            done += len(part)
            on_progress(done)
    return sums, tokens


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Decoder, variables: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B]: the summed loss of each row."""
    sums = -token_logps(model, make_unembed(model), variables, batch, None).sum(-1)
    return sharding.constrain(sums, None)
