"""Entries of data.eval that are measured by likelihoods: in a run, beside what they are in words."""

import json
import math
import runpy

import pytest
from support.runs import write_run

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import likely, scored
from ftjax.evals.entries import best_metric
from ftjax.train import train
from ftjax.training import metrics

QUESTIONS = [
    {"question": "Which lamp is broken?", "choices": ["the red lamp", "the blue one"], "answer": answer}
    for answer in (0, 1, "B", "the red lamp")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_choices_and_perplexity_are_measured_in_a_run(tmp_path):
    write_run(tmp_path)
    said = [("The red lamp is broken", "send red"), ("The blue lamp", "send blue")]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in said]
    texts = write(tmp_path / "texts.jsonl", [{"messages": its} for its in turns])
    questions = write(tmp_path / "quiz.jsonl", QUESTIONS)
    config = runpy.run_path(str(tmp_path / "run.py"))["get_config"]()
    entries = ({"source": questions, "score": "multiple_choice"}, {"source": texts, "score": "perplexity"})
    config.data.eval, config.steps = (texts, *entries), 1
    assert best_metric(config) == ("eval_quiz/multiple_choice", "max")
    assert train(config, tmp_path / "run") == 0
    for record in metrics.read(tmp_path / "run/metrics.jsonl"):
        if "eval_loss" in record:
            # Two questions have either answer, and the model cannot tell them apart.
            assert record["eval_quiz/multiple_choice"] == record["eval_quiz/multiple_choice_by_bytes"] == 0.5
            assert record["eval_texts/perplexity"] == pytest.approx(math.exp(record["eval_loss"]), rel=1e-5)
    assert {"eval_texts/perplexity", "eval_quiz/multiple_choice"} <= record.keys()


def test_what_decides_without_a_score_is_the_perplexity():
    config = configs.defaults()
    config.data.eval = ({"source": "texts.jsonl", "score": "perplexity"},)
    assert best_metric(config) == ("eval_texts/perplexity", "min")


def test_rows_that_are_none_are_refused(tmp_path):
    config = configs.defaults()
    config.data.eval = ({"source": write(tmp_path / "rows.jsonl", [{"text": "a"}]), "score": "multiple_choice"},)
    with pytest.raises(UserError, match=r"rows.jsonl:1: a question with choices has `question`"):
        likely.likely_sets(config, None, 100)
    config.data.eval = ({"source": write(tmp_path / "quiz.jsonl", QUESTIONS), "score": "multiple_choices"},)
    with pytest.raises(UserError, match="did you mean 'multiple_choice'"):
        scored.scored_sets(config)
