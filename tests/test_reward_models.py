"""Runs of reward models: every way to train, resumption, and what such a run has no use for."""

import json
import re

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of, write_pairs
from support.runs import write_model
from support.tiny import one_device

from ftjax import assemble, preflight, train, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.method import check_generates, method_of
from ftjax.planning import flops
from ftjax.training import metrics
from ftjax.training.loop import place_batch
from ftjax.training.state import normalization

WAYS = {
    "lora": {},
    "dora": {"adapter.kind": "dora"},
    "whole": {"adapter.kind": "none", "optimizer.learning_rate": 1e-3},
    "quantized": {"quantize.base": "int8"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("rewards")
    write_model(root / "model", tie_word_embeddings=False)
    write_pairs(root / "pairs.jsonl", 40)
    write_pairs(root / "held.jsonl", 12, seed=1)
    return root


def reward_config(root, **changes):
    return config_of(root, **{"objective.name": "reward", "data.checks": "off", "log_every": 1} | changes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_rewards_are_learned_with_the_vocabularys_head_as_it_was(root, way):
    config = reward_config(root, **WAYS[way], **{"objective.ensemble": 2, "steps": 12})
    program, start, loader = begun(config)
    state, margins = start.state, []
    assert not [path for path in tree.flatten(state.trainable) if "lm_head" in path]
    with jax.set_mesh(one_device()):
        for step in range(12):
            state, found = program.step(state, start.frozen, place_batch(one_device(), loader.batch(step), 1))
            margins.append(float(found["margin"]))
    assert np.mean(margins[-3:]) > np.mean(margins[:3]) + 1
    mean, deviation = normalization(state.kept)
    assert mean.shape == (2,)
    assert (deviation > 0.1).all()


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit_with_its_head_and_what_is_kept(root, tmp_path):
    held = {"data.eval": (str(root / "held.jsonl"),), "objective.ensemble": 2, "checkpoint_every": 2}
    config = reward_config(root, **held)
    assert train.train(config, tmp_path / "run") == 0
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    assert records[-1]["eval_accuracy"] > 0.5
    assert {"eval_brier", "eval_confidence", "eval_disagreement", "eval_min_reward"} <= records[-1].keys()
    assert not [name for name in records[-1] if "general" in name]
    with assemble.Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        config, base = configs.read(tmp_path / "run/config.json"), assemble.open_base(config.model)
        with jax.set_mesh(one_device()):
            program = assemble.program(config, base.model, one_device(), 4)
        _, state, _ = checkpoints.restore(program.state)
        first = jax.device_get(state)
    again = configs.changed(reward_config(root, **held), {"checkpoint.resume_step": 2})
    assert train.train(again, tmp_path / "run") == 0
    for old, new in zip(records, metrics.read(tmp_path / "run/metrics.jsonl"), strict=True):
        assert all(new[name] == old[name] for name in old.keys() - {"step_time", "tokens_per_second", "data_wait"})
    with assemble.Checkpoints(tmp_path / "run/checkpoints", read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore(program.state)
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(state))
    with pytest.raises(UserError, match="'reward' made a model that gives numbers and does not generate"):
        assemble.load_run(tmp_path / "run", check=check_generates)


def test_what_says_nothing_is_not_asked(root):
    for changes, message in (
        ({"data.eval": ("task:support_ticket",)}, "support_ticket is about what a model says"),
        ({"data.eval": ({"source": "x.jsonl", "score": "perplexity"},)}, "x.jsonl is about what a model says"),
        ({"evaluate.general": ("x.txt",)}, "evaluate.general: objective.name='reward' makes"),
    ):
        with pytest.raises(UserError, match=message):
            preflight.check_evaluation(reward_config(root, **changes))
    for changes, message in (
        ({"objective.kl_coef": 0.1}, "objective.kl_coef: objective.name='reward' does not use it"),
        ({"objective.beta": 0.2}, "objective.beta"),
        ({"data.train_on": "all"}, "data.train_on"),
    ):
        with pytest.raises(UserError, match=message):
            method_of(reward_config(root, **changes))
    config = reward_config(root, **{"adapter.modules_to_save": ("lm_head",)})
    with pytest.raises(UserError, match="does not use lm_head"):
        assemble.abstract_variables(config, assemble.open_base(config.model).model, one_device())


@pytest.mark.slow
def test_a_step_makes_no_logits_and_counts_none(root):
    needed, products = {}, {}
    for name in ("cpo", "reward"):
        config = reward_config(root, **{"objective.name": name})
        model = assemble.open_base(config.model).model
        with jax.set_mesh(one_device()):
            program = assemble.program(config, model, one_device(), 4)
            lowered = program.step.lower(program.state, program.frozen, program.batch).as_text()
        lines = [line for line in lowered.splitlines() if "dot_general" in line]
        products[name] = [line for line in lines if re.search(r"[x<]400x", line)]
        needed[name] = flops.of_step(program)
    tokens, width = 4 * 96, 32
    assert products["cpo"]
    assert not products["reward"]
    assert needed["cpo"].forward - needed["reward"].forward == 2 * tokens * width * (400 - 1)


def write_steps(path, count, seed=0):
    """Answers of two steps: right ones name the color of the question, wrong ones another."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        labels = [bool(right) for right in rng.random(2) < 0.5]
        steps = ["send blue" if right else "it is old" for right in labels]
        rows.append({"prompt": f"The blue lamp {i} {seed}", "completions": steps, "labels": labels})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_classes(path, count, seed=0):
    texts = [f"The {('blue', 'red')[i % 2]} lamp {i} {seed}" for i in range(count)]
    rows = [{"text": text, "label": ("cold", 1)[i % 2]} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [("prm", write_steps, {}), ("classify", write_classes, {"objective.classes": ("cold", "warm", "gray")})],
)
def test_steps_and_classes_are_learned_and_a_resumed_run_is_the_same(root, tmp_path, capsys, name, write, settings):
    data = {"data.train": (write(tmp_path / "rows.jsonl", 60),), "data.eval": (write(tmp_path / "held.jsonl", 20, 1),)}
    given = {"objective.name": name, "steps": 12, "checkpoint_every": 6, "accumulate": 2, "data.checks": "on"}
    config = reward_config(root, **given | data | settings)
    assert train.train(config, tmp_path / "run") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert ("no row of training has the class 'gray'" in said) == (name == "classify")
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    assert records[-1]["eval_accuracy"] > 0.9 > records[0]["eval_accuracy"]
    again = configs.changed(config, {"checkpoint.resume_step": 6})
    assert train.train(again, tmp_path / "run") == 0
    assert metrics.read(tmp_path / "run/metrics.jsonl")[-1] == records[-1]


def test_classes_are_named_in_the_config(root):
    for classes, message in (((), "config.objective.classes: name the classes"), (("a",), "two or more different")):
        with pytest.raises(UserError, match=message):
            method_of(reward_config(root, **{"objective.name": "classify", "objective.classes": classes}))
