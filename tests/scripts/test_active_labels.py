"""scripts/active_labels.py: both ways to choose begin alike, learn what the teacher prefers, and are counted right."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from ftjax.tasks import support_preference, support_ticket

FILE = Path(__file__).parents[2] / "scripts/active_labels.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("active_labels", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_learn_a_hidden_preference_from_the_same_first_labels(script, monkeypatch):
    monkeypatch.setattr(script, "ROUNDS", 6)
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal(12)

    def pool(count):
        differences = rng.standard_normal((count, 12)).astype(np.float32)
        return script.Pool(differences, differences @ wanted > 0)

    train, test = pool(400), pool(300)
    drawn, active = (script.accuracies(train, test, chosen, seed=1) for chosen in (False, True))
    assert drawn[0] == active[0] < 0.85
    assert len(drawn) == len(active) == 7
    assert min(drawn[-1], active[-1]) > 0.85
    assert drawn[1:] != active[1:]


def test_labels_are_counted_until_an_accuracy_is_held(script):
    assert script.labels_for(0.7, [0.8, 0.9]) == script.FIRST
    assert script.labels_for(0.7, [0.6, 0.75, 0.65, 0.72, 0.8]) == script.FIRST + 3 * script.EVERY
    assert script.labels_for(0.7, [0.8, 0.6]) == np.inf


def test_an_answer_of_each_kind_has_a_hidden_score_and_is_another_text(script):
    examples = support_ticket.train_examples(5)
    for example, found in script.answers(examples, seed=3):
        texts, scores = zip(*found)
        assert texts[0] == example["messages"][-1]["content"]
        assert len(set(texts)) == 4
        assert sorted(scores, reverse=True) == list(scores)
    again = support_preference.with_fault(examples[0], "wrong", random.Random("3 0 wrong"))
    assert again == script.answers(examples, seed=3)[0][1][2][0]
