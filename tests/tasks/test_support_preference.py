"""Pairs of support tickets and the same with labels: faults as they are meant, and held-out prompts of their own."""

import collections
import json

import numpy as np
import pytest

from ftjax import config as configs
from ftjax.data.format import formats
from ftjax.data.read.sources import read_sources
from ftjax.evals.entries import metric_names, split_entries
from ftjax.tasks import registry, support_labeled, support_ticket
from ftjax.tasks import support_preference as task

SPLITS = {"train": task.train_examples, "test": task.test_examples}


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict]]:
    return {name: examples() for name, examples in SPLITS.items()}


def asked(row: dict) -> str:
    return row["prompt"][-1]["content"]


def text(row: dict, side: str) -> str:
    (answer,) = row[side]
    return answer["content"]


@pytest.mark.parametrize(("split", "count"), [("train", 400), ("test", 200)])
def test_chosen_is_the_right_ticket_and_rejected_has_its_fault(data, split, count):
    rows = data[split]
    assert len(rows) == count
    for row in rows:
        example = {"messages": [*row["prompt"], *row["chosen"]]}
        right, other = text(row, "chosen"), text(row, "rejected")
        assert support_ticket.score(right, example) == 1.0
        assert support_ticket.score(other, example) == 0.0
        ticket = json.loads(right)
        start, end = other.find("{"), other.rfind("}") + 1
        found = json.loads(other[start:end])
        more = {key for key in found if key not in ticket}
        worded = (start, end) != (0, len(other)) or bool(more)
        wrong = any(json.dumps(found.get(key)) != json.dumps(ticket[key]) for key in ticket)
        assert (row["fault"] != "wrong", row["fault"] != "verbose") == (worded, wrong)
        if row["fault"] == "wrong":  # in the form of the right one
            assert other == json.dumps(found, separators=(",", ":"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_fault_is_met_and_length_alone_does_not_tell_the_answers_apart(data, split):
    rows = data[split]
    kinds = collections.Counter(row["fault"] for row in rows)
    assert kinds == {"wrong": len(rows) / 2, "verbose": len(rows) / 4, "both": len(rows) / 4}
    fields = collections.Counter()
    for row in rows:
        if row["fault"] == "wrong":
            right, other = (json.loads(text(row, side)) for side in ("chosen", "rejected"))
            fields[next(key for key in right if right[key] != other.get(key))] += 1
    assert fields.keys() == set(support_ticket.KEYS)
    assert fields.most_common(1)[0][0] == "issue"
    lengths = np.array([[len(text(row, side)) for side in ("chosen", "rejected")] for row in rows])
    longer = np.sign(lengths[:, 1] - lengths[:, 0])
    terse = np.array([row["fault"] == "wrong" for row in rows])
    assert all((longer[terse] == sign).mean() > 0.15 for sign in (-1, 0, 1))
    assert max(((longer > 0) + (longer == 0) / 2).mean(), (longer >= 0).mean()) < 0.85  # preferring the shorter one


def test_no_prompt_of_the_held_out_pairs_is_trained_on_by_any_of_the_tasks(data):
    trained = [asked(row) for row in data["train"]]
    before = [example["messages"][1]["content"] for example in support_ticket.train_examples()]
    assert len({*trained, *before}) == 400 + 800  # other prompts than the supervised run's
    assert not {asked(row) for row in data["test"]} & {*trained, *before}


def test_a_pair_depends_on_its_index_and_the_seed_alone(data):
    assert task.train_examples(37) == data["train"][:37]
    assert task.test_examples(211)[:200] == data["test"]
    others = task.train_examples(37, seed=1)
    assert all(asked(ours) != asked(other) for ours, other in zip(data["train"], others))


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_those_of_the_pairs(data, split):
    rows = registry.examples(registry.get("support_labeled"), split)
    assert len(rows) == 2 * len(data[split])
    for good, bad, pair in zip(rows[::2], rows[1::2], data[split]):
        assert (good["label"], bad["label"]) == (True, False)
        assert good["prompt"] == bad["prompt"] == pair["prompt"]
        assert (good["completion"], bad["completion"]) == (pair["chosen"], pair["rejected"])
    assert len(support_labeled.train_examples(3)) == 6


def test_they_are_rows_of_their_formats_and_the_chosen_answers_are_demonstrations():
    kinds = {"support_preference": "preference", "support_labeled": "unpaired"}
    for name, kind in kinds.items():
        rows = read_sources([{"source": f"task:{name}", "split": "test", "limit": 3}])
        assert {formats.kind_of(rows[i].fields) for i in range(3)} == {kind}
    options = {"format": "prompt_completion", "columns": {"completion": "chosen"}}
    row = read_sources([{"source": "task:support_preference", **options}])[0]
    assert support_ticket.score(row.fields["messages"][-1]["content"], row.fields) == 1.0


def test_without_a_score_held_out_rows_have_a_loss():
    config = configs.defaults()
    config.data.eval = ("task:support_preference", "task:support_ticket")
    answered, measured = split_entries(config)
    assert [entry["source"] for entry in answered] == ["task:support_ticket"]
    assert measured == [{"split": "test", "source": "task:support_preference"}]
    assert metric_names(config) == ["eval_support_ticket/score"]
