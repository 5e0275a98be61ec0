"""What decides: sums of metrics as they are written, and what is refused."""

import math

import pytest

from ftjax.errors import UserError
from ftjax.evals.deciding import parse

RECORD = {
    "step": 8,
    "eval_loss": 2.0,
    "eval_a/score": 0.5,
    "eval_my-rows[test[:9]]/f1": 0.25,
    "eval_general/change": 0.2,
}


@pytest.mark.parametrize(
    ("text", "value", "mode"),
    [
        ("eval_loss", 2.0, "min"),
        ("eval_a/score", 0.5, "max"),
        ("eval_a/perplexity", None, "min"),
        ("eval_general/code", None, "min"),
        ("eval_general/kl", None, "min"),
        ("eval_a/exchange", None, "max"),
        ("eval_mean_token_accuracy", None, "max"),
        ("eval_a/score - 0.5 * eval_general/change", 0.4, "max"),
        ("eval_a/score - eval_general/change*.5", 0.4, "max"),
        ("-1e-1*eval_a/score + 2 * eval_loss", 3.95, "min"),
        ("eval_my-rows[test[:9]]/f1 + eval_a/score", 0.75, "max"),
        (" max: eval_a/score + eval_loss ", 2.5, "max"),
        ("min:eval_entropy", None, "min"),
    ],
)
def test_a_sum_of_metrics(text, value, mode):
    decides = parse(text)
    assert decides.mode == mode
    assert decides.value(RECORD) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it names no metric"),
        ("loss", "'loss' is no metric of an evaluation, whose names begin with eval_"),
        ("eval_a/score eval_loss", r"there is no \+ or - before 'eval_loss'"),
        ("eval_a/score - ", r"a term is a metric, or a number \* a metric"),
        ("0.5 * 2", r"a term is a metric, or a number \* a metric"),
        ("0.5 eval_loss", r"a term is a metric"),
        ("eval_a/score / 2", "there is no"),
        ("eval_a/score + eval_loss", "cannot be told from its metrics; write 'max:eval_a/score"),
        ("eval_entropy", "write 'max:eval_entropy' or 'min:eval_entropy'"),
        ("__import__('os')", "is no metric"),
    ],
)
def test_what_is_no_sum_of_metrics_is_refused(text, said):
    with pytest.raises(UserError, match=rf"config\.evaluate\.best=.*{said}"):
        parse(text)


def test_a_metric_that_the_run_does_not_measure_is_refused_with_those_it_does():
    parse("eval_a/score").check(RECORD)
    with pytest.raises(UserError, match=r"measures no eval_a/scor; did you mean 'eval_a/score'\? known: .*eval_loss"):
        parse("eval_a/scor").check(RECORD)


def test_an_improvement_is_more_than_a_difference_and_nan_is_none():
    loss, score = parse("eval_loss"), parse("eval_a/score")
    assert loss.improves(1.0, 2.0, 0.5)
    assert not loss.improves(1.5, 2.0, 0.5)
    assert not loss.improves(3.0, 2.0, 0.0)
    assert score.improves(3.0, 2.0, 0.5)
    assert not score.improves(2.0, 2.0, 0.0)
    assert not score.improves(math.nan, 2.0, 0.0)
