"""Online DPO whose pairs a judge decides: here, behind an endpoint, in both orders, and what it may be wrong about."""

import json
import re

import jax
import numpy as np
import pytest
from support.endpoints import serving
from support.pairs import begun, config_of
from support.runs import write_model, write_rows

from ftjax import assemble, config_changes, judging, origin, rewards, rollouts, train
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals.judge import Judge
from ftjax.evals.scored import Question
from ftjax.prompts import Prompt
from ftjax.selected import Selected
from ftjax.training import digest, metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("judging")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config_for(root, judge, **changes):
    """Two prompts with three completions each in a step."""
    given = {
        "objective.name": "online_dpo",
        "objective.judge": judge,
        "data.train": (str(root / "rows.jsonl"),),
        "data.checks": "off",
        "data.max_length": 64,
        "data.row_length": 128,
        "data.batch_size": 2,
        "rollouts.samples": 3,
        "rollouts.max_new_tokens": 8,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    if judge.startswith("http"):
        given |= {"objective.judge_model": "someone", "objective.judge_key": ""}
    return config_of(root, **given | changes)


def made_by(config, workdir):
    """The first batch of a run, and what is recorded of it."""
    program, start, loader = begun(config)
    base = assemble.open_base(config.model)
    with jax.set_mesh(program.mesh):
        made = Selected(config, base, program, start.frozen, loader, workdir).batch(0, start.state)
    (line,) = (workdir / rollouts.FILE).read_text().splitlines()
    return made, json.loads(line)["completions"]


def answering(verdict):
    """A server whose model says "A", "B" or "TIE" by `verdict` of the two answers that a question has."""

    def reply(body):
        question = body["messages"][-1]["content"]
        a, b = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nGive your", question, re.DOTALL).groups()
        return {"message": {"content": f"Because.\n[[{verdict(a, b)}]]"}}

    return serving(reply)


def question(text):
    return Question(Prompt(f"rows.jsonl:{text}", {"prompt": text}), {"messages": [{"role": "user", "content": text}]})


def test_each_is_worth_the_share_of_the_others_that_it_beats_in_both_orders():
    """By length; of equal lengths the first is said to be better, which in both orders is no verdict."""

    def verdicts(questions, origins):
        assert origins == ["rows.jsonl:p"] * 3 + ["rows.jsonl:q"] * 2 + ["rows.jsonl:p"] * 3 + ["rows.jsonl:q"] * 2
        sides = [question.split("|")[1:] for question in questions]
        return ["A" if len(a) >= len(b) else "B" for a, b in sides]

    questions = [question(text) for text in "ppp" + "qqq"]
    texts = ["long", "s", "middle", "ab", "cd", "ab"]  # nobody is asked about the same text twice
    found = judging.wins(Judge("someone", verdicts, "{prompt}|{a}|{b}"), questions, texts, 3)
    assert found.tolist() == [0.5, 0.0, 1.0, 0.5, 0.5, 0.5]


def test_an_endpoint_decides_what_is_chosen(root, tmp_path):
    with answering(lambda a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "TIE") as server:
        made, records = made_by(config_for(root, server.url), tmp_path)
    assert {body["model"] for body in server.asked} == {"someone"}
    assert len(server.asked) == 2 * 2 * 3
    lengths = [len(one["text"]) for one in records]
    wins = [
        np.mean([0.5 + 0.5 * np.sign(mine - other) for other in np.delete(lengths, i)])
        for i, mine in enumerate(lengths)
    ]
    assert [one["rewards"]["judge"] for one in records] == wins
    assert [one["chosen"] for one in records][np.argmax(wins)] == 1
    assert [one["chosen"] for one in records][np.argmin(wins)] == -1
    assert made.metrics["rewards/judge/mean"] == made.metrics["reward"] == pytest.approx(0.5)
    assert made.metrics["groups/kept"] == made.arrays["weights"].any(axis=1).sum() > 0


def test_who_prefers_what_stands_first_says_nothing(root, tmp_path):
    with answering(lambda a, b: "A") as server:
        made, records = made_by(config_for(root, server.url), tmp_path)
    assert not made.arrays["weights"].any()
    assert made.metrics["groups/kept"] == 0
    assert [one["chosen"] for one in records] == [0, 0, 0]


def test_a_reply_without_a_verdict_ends_the_run_with_the_row(root, tmp_path):
    with serving(lambda body: {"message": {"content": "Both are good."}}) as server:
        config = config_for(root, server.url)
        with pytest.raises(
            UserError, match=r"(?s)rows.jsonl:\d+.*: the judge's reply has no verdict.*'Both are good.'"
        ):
            train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_with_a_model_here_as_its_judge_resumes_exactly(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    config = config_for(root, "model", steps=4)
    assert train.train(config, tmp_path / "run") == 0
    records, end = metrics.read(tmp_path / "run/metrics.jsonl"), digest.read(tmp_path / "run/checkpoints/4")["leaves"]
    assert sum(record["groups/kept"] for record in records) > 0
    assert configs.read(tmp_path / "run/config.json").objective.judge == str(root / "model")
    config.checkpoint.resume_step = 2
    assert train.train(config, tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    for metric in ("loss", "grad_norm", "groups/kept"):
        assert [record[metric] for record in again] == [record[metric] for record in records]
    assert digest.read(tmp_path / "run/checkpoints/4")["leaves"] == end


@pytest.mark.parametrize("judge", ["model", "org/judge", "https://HOST/v1"])
def test_the_place_of_a_judge_is_the_same_from_every_directory(root, monkeypatch, judge):
    """In what a run records, and in what is compared with it when it goes on; ids of the Hub and URLs are no places."""
    monkeypatch.chdir(root)
    config = config_for(root, judge)
    recorded = origin.located(config, root / "model")
    assert recorded.objective.judge == (str(root / "model") if judge == "model" else judge)
    again = configs.changed(config, {"objective.judge": origin.located_judge(config)})
    assert config_changes.changes(recorded, again) == []


def test_the_memory_of_a_model_here_is_counted(root):
    its = rewards.needed(config_for(root, str(root / "model")))
    assert its == pytest.approx((root / "model/model.safetensors").stat().st_size, rel=0.05)
    assert rewards.needed(config_for(root, "https://HOST/v1")) == 0


@pytest.mark.parametrize(
    ("judge", "changes", "said"),
    [
        ("model", {"objective.rewards": ("f1",)}, "judge=model: the judge alone says what is better"),
        ("model", {"rollouts.samples": 1}, "samples=1: .*compares completions of the same prompt"),
        (
            "https://HOST/v1",
            {"objective.judge_model": ""},
            "judge_model: name the model that https://HOST/v1 is to ask",
        ),
        ("model", {"objective.judge_model": "m"}, "judge_model is of a judge behind an endpoint"),
        ("nowhere/at/all", {}, "config.objective.judge=nowhere/at/all: "),
        ("model", {"objective.name": "rejection"}, "judge: objective.name='rejection' does not use it .of online_dpo"),
    ],
)
def test_mistakes_are_named(root, tmp_path, judge, changes, said):
    with pytest.raises(UserError, match=said):
        train.train(config_for(root, judge, **changes), tmp_path / "run")
