"""Agreement beyond chance, against nltk's."""

import numpy as np
import pytest
from nltk.metrics.agreement import AnnotationTask

from ftjax.labeling.agreement import Agreement, agreement, alpha, kappa
from ftjax.labeling.journal import Label


def labels_of(judgements):
    """judgements: for each pair {labeler: choice}."""
    return {
        str(i): {who: Label(str(i), who, choice, "a", 1.0, "") for who, choice in by.items()}
        for i, by in enumerate(judgements)
    }


def some(seed, labelers, missing):
    """Judgements that agree more often than not."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(["a", "b", "tie"], 40, p=[0.5, 0.4, 0.1])
    return [
        {who: str(rng.choice([one, "a", "b", "tie"])) for who in labelers if rng.random() >= missing} for one in truth
    ]


def witness(judgements):
    items = [by for by in judgements if len(by) > 1]
    return AnnotationTask(data=[(who, i, choice) for i, by in enumerate(items) for who, choice in by.items()])


@pytest.mark.parametrize("seed", range(3))
def test_kappa_of_two_and_alpha_of_several(seed):
    two = some(seed, ["anna", "ben"], 0.0)
    assert kappa([(by["anna"], by["ben"]) for by in two]) == pytest.approx(witness(two).kappa(), rel=1e-12)
    more = some(seed, ["anna", "ben", "carl", "dora"], 0.4)
    assert alpha([list(by.values()) for by in more if len(by) > 1]) == pytest.approx(witness(more).alpha(), rel=1e-12)
    assert agreement(labels_of(two)).name == "Cohen's kappa"
    found = agreement(labels_of(more))
    assert found.name == "Krippendorff's alpha"
    assert found.value == pytest.approx(witness(more).alpha(), rel=1e-12)
    assert found.pairs == sum(len(by) > 1 for by in more)


def test_skips_are_left_out_and_where_all_is_the_same_chance_says_nothing():
    assert agreement(labels_of([{"anna": "a", "ben": "skip"}, {"anna": "b"}])) is None
    same = labels_of([{"anna": "a", "ben": "a"}, {"anna": "skip", "ben": "b"}])
    assert agreement(same) == Agreement(1, 1.0, "Cohen's kappa", None)
    assert agreement(labels_of([{"anna": "a", "ben": "a", "carl": "a"}])).value is None
