"""The data sets of reasoning-gym as tasks: against a stand-in of its interface, and where it is installed itself."""

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ftjax import config as configs
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import entries
from ftjax.tasks import reasoning_gym, registry


class Sums:
    """Entry i is made of seed + i, as there; few questions, so that some come twice."""

    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __getitem__(self, i):
        assert i < self.size
        draw = random.Random(self.seed + i)
        a, b = draw.randint(1, 40), draw.randint(1, 40)
        answer = None if a == b else str(a + b)
        return {"question": f"{a} + {b} =", "answer": answer, "metadata": {"numbers": {a, b}}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.01


@pytest.fixture
def stand_in(monkeypatch):
    package = ModuleType("reasoning_gym")
    package.create_dataset = lambda name, seed, size: Sums(seed, size)
    package.factory = SimpleNamespace(DATASETS={"sums": None})
    extract = lambda text, tag_name="answer": text.partition("<answer>")[2].partition("</answer>")[0] or None  # noqa: E731
    package.utils = SimpleNamespace(extract_answer=extract)
    for name, module in (("", package), (".factory", package.factory), (".utils", package.utils)):
        monkeypatch.setitem(sys.modules, f"reasoning_gym{name}", module)
    for cached in (reasoning_gym._examples, reasoning_gym._dataset):
        cached.cache_clear()
    yield
    for cached in (reasoning_gym._examples, reasoning_gym._dataset):
        cached.cache_clear()


def test_rows_are_plain_and_held_out_questions_are_others(stand_in):
    task = registry.get("reasoning_gym/sums")
    train, test = (registry.examples(task, split) for split in ("train", "test"))
    asked = [[row["messages"][0]["content"] for row in rows] for rows in (train, test)]
    assert [len(its) == len(set(its)) for its in asked] == [True, True]
    assert not set(asked[0]) & set(asked[1])
    assert len(train) > 300
    assert 10 < len(test) < 100
    for row in test:
        answer = row["messages"][1]["content"]
        a, b = row["messages"][0]["content"].removesuffix(" =").split(" + ")
        assert answer == str(int(a) + int(b))
        assert [task.score(text, row) for text in (f" {answer}\n", f"It is <answer>{answer}</answer>.")] == [1, 1]
        assert task.score("I do not know", row) == 0.01
    rows = read_sources([{"source": "task:reasoning_gym/sums", "split": "test"}])
    assert [rows[i].fields["messages"][0]["content"] for i in range(len(rows))] == asked[1]


def test_its_metric_is_called_as_the_data_set_is(stand_in):
    config = configs.changed(configs.defaults(), {"data.eval": ("task:reasoning_gym/sums",)})
    assert entries.metric_names(config) == ["eval_sums/score"]
    with pytest.raises(UserError, match="reasoning-gym has no such data set; did you mean 'sums'"):
        registry.get("reasoning_gym/sum")


def test_it_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"reasoning-gym is not installed .*pip install 'ftjax\[gym\]'"):
        registry.get("reasoning_gym/chain_sum")


def test_the_package_itself():
    pytest.importorskip("reasoning_gym")
    task = registry.get("reasoning_gym/chain_sum")
    train, test = task.train_examples(50), task.test_examples(20)
    assert len(train) > 40
    for row in test:
        assert task.score(row["messages"][1]["content"], row) == 1
        assert task.score("no number", row) == 0
