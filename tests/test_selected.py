"""Learning from the best of what the model writes, alone or against the worst: its batches, and exact resumption."""

import json

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of
from support.runs import write_model, write_rows

from ftjax import assemble, rollouts, train, tree
from ftjax.errors import UserError
from ftjax.rollouts import Rollouts
from ftjax.selected import Selected, best, best_and_worst
from ftjax.training import metrics

REWARD = "support.rewards:of_e"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("selected")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


def config_for(root, name, **changes):
    """Two prompts with three completions each in a step."""
    given = {
        "objective.name": name,
        "objective.rewards": (REWARD,),
        "data.train": (str(root / "rows.jsonl"),),
        "data.checks": "off",
        "data.max_length": 64,
        "data.row_length": 128 if name == "online_dpo" else 64,
        "data.batch_size": 2,
        "rollouts.samples": 3,
        "rollouts.max_new_tokens": 8,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return config_of(root, **given | changes)


def made_by(kind, config, workdir):
    """What a source of this kind makes first, from the state that a run begins with."""
    program, start, loader = begun(config)
    base = assemble.open_base(config.model)
    workdir.mkdir(exist_ok=True)
    with jax.set_mesh(program.mesh):
        return kind(config, base, program, start.frozen, loader, workdir).batch(0, start.state)


def test_the_best_is_chosen_and_the_worst_against_it():
    rewards = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -1.0, 0.0]])
    chosen, teaches = best_and_worst(rewards, 0)
    assert chosen[[0, 2]].tolist() == [[1, 0], [0, 1]]
    assert teaches.tolist() == [True, False, True]
    chosen, teaches = best(rewards, 3.0)
    assert chosen.tolist() == [[1], [0], [0]]
    assert teaches.tolist() == [True, True, False]


@pytest.mark.parametrize(("name", "documents", "penalty"), [("online_dpo", 2, 0.0), ("rejection", 1, 100.0)])
def test_a_batch_holds_what_was_chosen_of_the_same_completions(root, tmp_path, name, documents, penalty):
    changes = {"objective.missing_eos_penalty": penalty, "seed": 3}
    made = made_by(Selected, config_for(root, name, **changes), tmp_path / "run")
    every = made_by(Rollouts, config_for(root, "grpo", **{"data.batch_size": 6, "seed": 3}), tmp_path / "all")
    ours, theirs = made.arrays, every.arrays
    texts = [json.loads(line) for line in (tmp_path / "run" / rollouts.FILE).read_text().splitlines()]
    assert len(texts) == 1
    found = texts[0]["completions"]
    ended = [np.count_nonzero(theirs["weights"][row]) < 8 for row in range(3)]
    values = [one["rewards"][REWARD] - penalty * (not end) for one, end in zip(found, ended, strict=True)]
    teaches = max(values) > min(values) or name == "rejection"
    wanted = [int(np.argmax(values)), int(np.argmin(values))][:documents]
    for document, row in enumerate(wanted, 1):
        mine, there = ours["segment_ids"][0] == document, theirs["segment_ids"][row] == 1
        np.testing.assert_array_equal(ours["tokens"][0][mine], theirs["tokens"][row][there])
        np.testing.assert_array_equal(ours["weights"][0][mine], theirs["weights"][row][there] * teaches)
    assert ours["segment_ids"].max() == documents
    assert len(ours["tokens"]) == made.metrics["groups/written"] == 2
    signs = [one["chosen"] for one in found]
    assert signs[wanted[0]] == teaches
    assert sum(map(abs, signs)) == documents * teaches
    assert made.metrics["groups/kept"] == ours["weights"].any(axis=1).sum()
    if name == "online_dpo":
        assert made.metrics["objective/scores"] == made.metrics["reward"]
        surprise = -theirs["sampled_logps"].sum(axis=1).mean()
        assert made.metrics["objective/entropy"] == pytest.approx(surprise, rel=1e-5)
    assert made.metrics["reward"] == pytest.approx(
        every.metrics["reward"] - penalty * every.metrics["completions/clipped_ratio"]
    )


def test_what_is_not_good_enough_and_what_is_as_good_teaches_nothing(root, tmp_path):
    config = config_for(root, "rejection", **{"objective.least_reward": 2.0})
    assert not made_by(Selected, config, tmp_path / "run").arrays["weights"].any()
    config = config_for(root, "online_dpo", **{"objective.rewards": ("support.rewards:of_prompt",)})
    made = made_by(Selected, config, tmp_path / "run")
    assert not made.arrays["weights"].any()
    assert made.metrics["groups/kept"] == made.metrics["objective/scores_margin"] == 0


def values_of(workdir):
    _, _, variables, step = assemble.load_run(workdir)
    assert step == 4
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(variables["lora"]).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online_dpo", "rejection"])
def test_a_run_resumes_exactly(root, tmp_path, name):
    config = config_for(root, name, steps=4)
    assert train.train(config, tmp_path / "run") == 0
    records, end = metrics.read(tmp_path / "run/metrics.jsonl"), values_of(tmp_path / "run")
    if name == "online_dpo":
        assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert records[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        kls = [record["objective/kl"] for record in records]
        assert kls[0] == pytest.approx(0, abs=1e-5)
        assert max(map(abs, kls[1:])) > 1e-3
    config.checkpoint.resume_step = 2
    assert train.train(config, tmp_path / "run") == 0
    again = metrics.read(tmp_path / "run/metrics.jsonl")
    for metric in ("loss", "grad_norm", "reward"):
        assert [record[metric] for record in again] == [record[metric] for record in records]
    for path, leaf in values_of(tmp_path / "run").items():
        np.testing.assert_array_equal(leaf, end[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("online_dpo", {}), ("rejection", {"objective.least_reward": 1.0, "optimizer.learning_rate": 1e-2})],
)
def test_a_bandit_is_solved(tmp_path, name, changes):
    """400 arms, of which those are rewarded that begin with a capital letter: a reward of 1 is the best there is."""
    write_model(tmp_path / "model", hidden_size=128, intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl", 40)
    given = {"objective.rewards": ("support.rewards:capital",), "rollouts.max_new_tokens": 1, "steps": 24}
    given |= {"data.batch_size": 8, "rollouts.samples": 8} | changes
    assert train.train(config_for(tmp_path, name, **given), tmp_path / "run") == 0
    rewards = [record["reward"] for record in metrics.read(tmp_path / "run/metrics.jsonl") if "reward" in record]
    assert rewards[0] < 0.3
    assert np.mean(rewards[-4:]) > 0.9, rewards


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("online_dpo", {"rollouts.samples": 1}, "samples=1: .*compares completions of the same prompt; set it to 2"),
        ("rejection", {"rollouts.resample": 1}, r"rollouts.resample: .*does not use it \(of grpo, rloo\)"),
        ("online_dpo", {"objective.least_reward": 0.0}, r"least_reward: .*does not use it \(of rejection\)"),
        ("online_dpo", {"data.row_length": 64}, r"row_length=64: the longest prompt has \d+ tokens.*follow, twice"),
        ("online_dpo", {"objective.loss": ("sigmoidd",)}, "sigmoidd"),
        ("rejection", {"objective.rewards": ()}, "is no task with a score of its own"),
    ],
)
def test_mistakes_are_named(root, tmp_path, name, changes, said):
    with pytest.raises(UserError, match=said):
        train.train(config_for(root, name, **changes), tmp_path / "run")
