"""The digest of what a run is evaluated on."""

from types import SimpleNamespace

from ftjax import config as configs
from ftjax.evals import scored
from ftjax.evals.evaluator import Evaluator

TASK = "task:support_ticket"


def digest(rows="abc", evaluated=({"source": TASK, "limit": 3},), **evaluate):
    config = configs.defaults()
    config.data.eval = evaluated
    config.evaluate.update(evaluate)
    parts = {"_sets": scored.scored_sets(config), "_likely": [], "_config": config.evaluate}
    return Evaluator.digest(SimpleNamespace(_loader=SimpleNamespace(examples=SimpleNamespace(digest=rows)), **parts))


def test_the_digest_of_an_evaluation_set_is_that_of_all_that_its_scores_depend_on():
    others = [
        digest("abd"),
        digest(evaluated=()),
        digest(evaluated=({"source": TASK, "limit": 2},)),
        digest(evaluated=({"source": TASK, "limit": 3, "score": "exact"},)),
        digest(max_new_tokens=9),
        digest(samples=2, temperature=1.0),
        digest(general=("own.jsonl",)),
    ]
    assert len({digest(), *others}) == 8
    assert digest() == digest()
    assert digest(evaluated=(), max_new_tokens=9) == digest(evaluated=())  # nothing is generated
