"""Runs of RLOO and PPO: what their batches hold, against the formulas in float64, and that they resume exactly."""

import json

import jax
import numpy as np
import pytest
from support.rollouts import config_for, source_of
from support.runs import write_model, write_rows

from ftjax import rollouts, tree
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps

TEMPERATURE, KL, NO_END = 0.7, 0.5, 50.0
ENDS = tuple(range(100, 140))  # of 400 tokens, so that some completions of 8 end and some do not


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo")
    write_model(root / "model")
    write_rows(root / "rows.jsonl", 40)
    return root


def moved(state):
    """A state in which adapters and heads say something, as after training."""
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    add = lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)  # noqa: E731
    return state.replace(trainable=jax.tree.map(add, state.trainable))


def logps_of(program, variables, arrays):
    unembed = make_unembed(program.model)
    at_temperature = lambda *given: unembed(*given) / TEMPERATURE  # noqa: E731
    return np.float64(token_logps(program.model, at_temperature, variables, arrays, None))


def made_by(root, tmp_path, **changes):
    """(the batch of one prompt with 8 completions, log p / p_reference of its tokens, its records, program, state)"""
    given = {"rollouts.temperature": TEMPERATURE, "rollouts.samples": 8, "data.batch_size": 8, "objective.kl_coef": KL}
    source, start, program = source_of(config_for(root, **given, **changes), tmp_path, ENDS)
    state = moved(start.state)
    with jax.set_mesh(program.mesh):
        made = source.batch(0, state)
    arrays = made.arrays
    variables = tree.combine(state.trainable, start.frozen)
    ours, reference = (logps_of(program, its, arrays) for its in (variables, {"params": start.frozen["params"]}))
    there = arrays["weights"] > 0
    assert np.abs(ours - arrays["sampled_logps"])[there].max() < 1e-4
    (line,) = (tmp_path / rollouts.FILE).read_text().splitlines()
    return made, np.where(there, ours - reference, 0), json.loads(line)["completions"], program, variables


def scores_of(made, records):
    """What each completion is worth: less where its last token is no end token."""
    arrays = made.arrays
    last = [np.flatnonzero(row)[-1] for row in arrays["weights"]]
    ended = np.isin(arrays["targets"][np.arange(8), last], ENDS)
    assert 0 < ended.sum() < 8
    assert made.metrics["completions/clipped_ratio"] == 1 - ended.mean()
    (rewards,) = zip(*(one["rewards"].values() for one in records), strict=True)
    return np.array(rewards) - NO_END * ~ended, last


def test_the_kl_of_rloo_is_in_the_reward(root, tmp_path):
    changes = {"objective.name": "rloo", "objective.missing_eos_penalty": NO_END}
    made, kl, records, _, _ = made_by(root, tmp_path, **changes)
    assert np.abs(kl).max() > 0.1
    there = made.arrays["weights"] > 0
    np.testing.assert_allclose(made.metrics["kl"], kl.sum() / there.sum(), rtol=1e-4)
    worth = scores_of(made, records)[0] - KL * kl.sum(axis=1)
    others = np.array([np.delete(worth, i).mean() for i in range(8)])
    wanted = np.where(there, (worth - others)[:, None], 0)
    np.testing.assert_allclose(made.arrays["advantages"], wanted, atol=1e-3)
    np.testing.assert_allclose([one["advantage"] for one in records], worth - others, atol=1e-3)


def test_ppo_has_a_penalty_for_each_token_and_the_score_at_the_end_token(root, tmp_path):
    changes = {"objective.missing_eos_penalty": NO_END, "objective.kl_estimator": "k3", "objective.discount": 0.9}
    made, kl, records, program, variables = made_by(root, tmp_path, **{"objective.name": "ppo"}, **changes)
    arrays, there = made.arrays, made.arrays["weights"] > 0
    scores, last = scores_of(made, records)
    kl = np.exp(-kl) - 1 + kl
    rewards = -KL * kl
    rewards[np.arange(8), last] += scores

    # What the critic says where a token is predicted, before it is known.
    hidden, _ = program.model.apply(variables, arrays["tokens"], arrays["positions"], arrays["segment_ids"])
    values = np.float64(hidden) @ np.float64(variables["heads"]["value"]["kernel"])[:, 0]
    assert np.abs(values[there]).max() > 0.1
    np.testing.assert_allclose(arrays["values"], np.where(there, values, 0), atol=1e-4)
    advantages = np.zeros(there.shape)
    for row, columns in enumerate(map(np.flatnonzero, there)):
        following = np.append(values[row, columns[1:]], 0)
        errors = rewards[row, columns] + 0.9 * following - values[row, columns]
        advantages[row, columns] = [
            sum((0.9 * 0.95) ** (j - i) * errors[j] for j in range(i, len(errors))) for i in range(len(errors))
        ]
    np.testing.assert_allclose(arrays["returns"], np.where(there, advantages + values, 0), rtol=1e-4, atol=1e-3)
    centered = advantages[there] - advantages[there].mean()
    np.testing.assert_allclose(arrays["advantages"][there], centered / centered.std(ddof=1), rtol=1e-3, atol=1e-4)
    assert not any(arrays[name][~there].any() for name in ("advantages", "returns", "values", "sampled_logps"))
    of_completions = {
        "objective/kl": kl.sum(axis=1).mean(),
        "objective/entropy": -arrays["sampled_logps"].sum(axis=1).mean(),
        "objective/scores": scores.mean(),
        "objective/rlhf_reward": rewards.sum(axis=1).mean(),
    }
    for name, wanted in of_completions.items():
        np.testing.assert_allclose(made.metrics[name], wanted, rtol=1e-4, err_msg=name)
