"""The examples that a task in data.eval is scored on are those that its options choose; the digest of all of it."""

from types import SimpleNamespace

import pytest

from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import evaluator
from ftjax.tasks import support_ticket

TASK = "task:support_ticket"


@pytest.mark.parametrize("options", [{}, {"split": "test[:10]"}, {"limit": 7}, {"split": "train[-50:]", "limit": 5}])
def test_a_task_is_scored_on_the_rows_that_reading_its_entry_gives(options):
    _, examples = evaluator._examples({"source": TASK, **options})
    rows = read_sources([{"source": TASK, "split": "test", **options}])
    assert [example["messages"] for example in examples] == [row.fields["messages"] for row in rows]
    assert len(examples) == options.get("limit", 10 if "split" in options else len(support_ticket.test_examples()))


@pytest.mark.parametrize("options", [{"format": "messages"}, {"weight": 2.0}])
def test_options_that_scoring_does_not_know_are_refused(options):
    with pytest.raises(UserError, match=f"task:support_ticket is scored, which knows no '{next(iter(options))}'"):
        evaluator._examples({"source": TASK, **options})


def digest(rows="abc", options=({},), max_new_tokens=8):
    loader = SimpleNamespace(examples=SimpleNamespace(digest=rows))
    tasks = [{"source": TASK, **one} for one in options]
    return evaluator.Evaluator.digest(
        SimpleNamespace(_loader=loader, _tasks=tasks, _config=SimpleNamespace(max_new_tokens=max_new_tokens))
    )


def test_the_digest_of_an_evaluation_set_is_that_of_all_its_scores_depend_on():
    others = [digest("abd"), digest(options=()), digest(options=({"limit": 5},)), digest(max_new_tokens=9)]
    assert len({digest(), *others}) == 5
    assert digest() == digest()
