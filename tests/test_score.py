"""ftjax.score, and rewards as a score of completions: by a model whose rewards are known."""

import json

import jax
import numpy as np
import pytest
from support.pairs import config_of, write_pairs
from support.runs import write_model, write_rows
from support.tiny import numpy_params, one_device

from ftjax import rewards, score, sharding
from ftjax.assemble import open_base
from ftjax.data.format.formats import check_row
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import scored, scores
from ftjax.evals.entries import metric_names
from ftjax.rewards import RewardModel


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("score")
    write_model(path / "model")
    write_pairs(path / "pairs.jsonl", 6)
    write_rows(path / "eval.jsonl", 5)
    return path


@pytest.fixture(scope="module")
def model(root):
    """Two heads on random weights, with a normalization."""
    base = open_base(config_of(root).model)
    kernel = np.random.default_rng(0).standard_normal((32, 2)).astype(np.float32)
    variables = {"params": numpy_params(base.model), "heads": {"score": {"kernel": kernel}}}
    variables = jax.device_put(variables, sharding.replicated(one_device()))
    return RewardModel(base, variables, np.array([0.5, -1.0]), np.array([2.0, 0.25]), 0.1, 512)


def test_rows_of_every_kind_get_their_rewards(root, model, tmp_path):
    question, good, bad = "The red lamp", "send red", "it is blue"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": good}]
    rows = [
        {"messages": turns},
        {"prompt": question, "completion": good},
        {"prompt": question, "completion": good, "label": False},
        {"prompt": question, "chosen": good, "rejected": bad},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_sources([{"source": str(tmp_path / "rows.jsonl")}])
    *single, pair = score.score_rows(model, [read[i] for i in range(4)])
    found = model.scores([(question, good), (question, bad), *[(question, "no")] * 3])
    good, bad = found[:2].astype(np.float64)
    for its in single:
        assert its == pytest.approx({"reward": good.mean(), "disagreement": good.var()}, rel=1e-5)
    chance = 1 / (1 + np.exp(-((good - bad) * [2.0, 0.25]).mean()))  # of rewards as they are, not normalized
    assert pair == pytest.approx(
        {
            "chosen_reward": good.mean(),
            "rejected_reward": bad.mean(),
            "likelihood": 0.9 * chance + 0.05,
            "disagreement": (good - bad).var(),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "once"}, "is a text; a reward is of an answer"),
        ({"text": "once", "label": "spam"}, "is a text; a reward is of an answer"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "is an answer in steps"),
        ({"messages": [{"role": "user", "content": "q"}], "label": "spam"}, "a reward is of an answer"),
    ],
)
def test_what_has_no_answer_has_no_reward(model, row, message):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
        score.score_rows(model, [check_row(row, "rows.jsonl:1")])


def test_a_conversation_without_an_answer_has_no_reward(model):
    with pytest.raises(UserError, match="conversation 0: a reward is of an answer"):
        model.scores([[{"role": "user", "content": "and?"}]])


def test_reward_is_a_score_of_completions(root, model, monkeypatch):
    """The mean over heads, of all at once; of an empty answer and one that begins with a space, too."""
    monkeypatch.setattr(rewards, "load", lambda path: model)
    config = config_of(root, **{"data.eval": ({"source": str(root / "eval.jsonl"), "score": f"reward:{root}"},)})
    (its,) = scored.scored_sets(config)
    assert its.metric == "eval_eval/reward" == metric_names(config)[0]
    answers = ["send red", "", " it", "send red", "no"]
    prompts = [question.example["messages"][:-1] for question in its.questions]
    turns = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers)]
    texts = model.base.tokenizer.apply_chat_template(turns, tokenize=False)
    tokens = model.base.tokenizer(texts, add_special_tokens=False)["input_ids"]
    expected = model.scores_of([np.asarray(ids) for ids in tokens]).mean(axis=1)
    assert len(set(expected.tolist())) > 3
    assert its.grade_all(answers, its.questions) == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="score 'reward:nowhere': no such directory"):
        scores.find("reward:nowhere", "config.data.eval: x")

    # An ensemble may be believed only as far as its heads agree.
    by_head = np.float64(model.scores_of([np.asarray(ids) for ids in tokens]))
    assert by_head.std(axis=1).min() > 0.01
    examples = [question.example for question in its.questions]
    for name, wanted in (("min", by_head.min(axis=1)), ("std=1.5", expected - 1.5 * by_head.std(axis=1))):
        found = scores.find(f"reward:{root}?{name}", "x")
        np.testing.assert_allclose(found.together(answers, examples), wanted, atol=1e-5)
        assert found.model == f"{root}?{name}"
    for wrong in ("max", "std", "std=-1", "std=much"):
        with pytest.raises(UserError, match=f"{wrong}': '{wrong}' is neither 'min' nor 'std=C'"):
            scores.find(f"reward:{root}?{wrong}", "x")
    monkeypatch.setattr(scores, "_loaded", lambda path: model._replace(mean=model.mean[:1]))
    with pytest.raises(UserError, match="has one head, which agrees with itself"):
        scores.find(f"reward:{root}?min", "x").together(answers, examples)
