"""The reference policy is what training starts from, however it trains, and stays that."""

import math

import jax
import numpy as np
import pytest
from support.pairs import begun, config_of, write_labeled, write_pairs
from support.runs import write_model
from support.tiny import one_device

from ftjax import assemble, train, tree
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.objectives.reference import REFERENCE, policy_and_reference
from ftjax.training import metrics
from ftjax.training.loop import place_batch
from ftjax.weights.peft.adapter import write_adapter

# How it trains -> what must be kept for the reference beside the base.
KINDS = {
    "fresh LoRA": ({}, set()),
    "gone on from": ({"adapter.source": "SFT"}, {"lora"}),
}
SLOW = {
    "full": ({"adapter.kind": "none", "adapter.rank": 16}, {"params"}),
    "modules_to_save": ({"adapter.modules_to_save": ("norm",)}, {"lora", "params"}),
    "LoRA of the embedding": ({"adapter.targets": "q_proj,embed_tokens"}, set()),
    "dropout": ({"adapter.dropout": 0.3}, set()),
    "DoRA": ({"adapter.kind": "dora"}, {"lora"}),
    "PiSSA": ({"adapter.init": "pissa"}, {"lora"}),
    "int8": ({"quantize.base": "int8"}, set()),
    "gone on from, KTO": ({"adapter.source": "SFT", "objective.name": "kto"}, {"lora"}),
    "full, KTO": ({"adapter.kind": "none", "adapter.rank": 16, "objective.name": "kto"}, {"params"}),
    "int8, KTO": ({"quantize.base": "int8", "objective.name": "kto"}, set()),
    "TR-KTO": ({"objective.reference_every": 100, "objective.name": "kto"}, set()),
}
RESUMED = ("full", "gone on from, KTO")
FIRST = {"dpo": math.log(2), "kto": 0.5}  # losses


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_model(root / "model")
    write_pairs(root / "pairs.jsonl", 40)
    write_labeled(root / "labeled.jsonl", 40)
    # An adapter that changes the model a lot, as after supervised tuning.
    config = config_of(root)
    program, start, _ = begun(config)
    rng = np.random.default_rng(3)
    adapters = tree.flatten(tree.combine(start.state.trainable, start.frozen)["lora"])
    moved = {
        path: leaf + 0.3 * rng.standard_normal(leaf.shape) * path.endswith("lora_b") for path, leaf in adapters.items()
    }
    facts = assemble.base_facts(config, assemble.open_base(config.model))
    write_adapter(root / "sft", tree.unflatten(moved), program.model.spec, facts)
    return root


def changes_of(name, root):
    changes = {key: str(root / "sft") if value == "SFT" else value for key, value in (KINDS | SLOW)[name][0].items()}
    if "objective.name" in changes:
        changes["data.train"] = (str(root / "labeled.jsonl"),)
    return changes


@pytest.mark.parametrize("name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_training_starts_at_margin_0_and_the_reference_stays_when_the_policy_moves(name, root):
    config, kept = config_of(root, **changes_of(name, root)), (KINDS | SLOW)[name][1]
    program, start, loader = begun(config)
    assert start.frozen.get(REFERENCE, {}).keys() == kept
    assert REFERENCE not in program.frozen or jax.tree.map(np.shape, start.frozen[REFERENCE]) == jax.tree.map(
        np.shape, program.frozen[REFERENCE]
    )
    with jax.set_mesh(one_device()):
        evaluate = jax.jit(
            lambda trainable, frozen, batch: program.objective(tree.combine(trainable, frozen), batch, None)
        )
        batch = {key: value[0] for key, value in place_batch(one_device(), loader.batch(0), 1).items()}
        before = evaluate(start.state.trainable, start.frozen, batch)
        count = float(before.weight)
        assert count >= 4
        assert float(before.metrics["rewards/margins"][0]) == 0
        assert float(before.metrics.get("kl", [0])[0]) == 0
        assert float(before.sum) / count == pytest.approx(FIRST[config.objective.name], rel=1e-6)

        reference = jax.tree.map(np.asarray, policy_and_reference(tree.combine(start.state.trainable, start.frozen))[1])
        state = start.state
        for index in range(4):
            arrays = place_batch(one_device(), loader.batch(index), 1)
            state, _ = program.step(state, start.frozen, arrays)
        after = evaluate(state.trainable, start.frozen, batch)
        assert float(after.sum) < float(before.sum)
        assert float(after.metrics["rewards/margins"][0]) > 0
        again = policy_and_reference(tree.combine(state.trainable, start.frozen))[1]
        jax.tree.map(np.testing.assert_array_equal, reference, jax.tree.map(np.asarray, again))


@pytest.mark.parametrize(
    "name", ["gone on from", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fresh LoRA", *SLOW))]
)
def test_the_reference_says_what_a_separately_loaded_model_says_bit_for_bit(name, root):
    changes = {key: str(root / "sft") if value == "SFT" else value for key, value in (KINDS | SLOW)[name][0].items()}
    program, start, loader = begun(config_of(root, **changes))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, start.state.trainable)
    policy, reference = policy_and_reference(tree.combine(moved, start.frozen))
    _, again, _ = begun(config_of(root, **changes))
    separate, _ = policy_and_reference(tree.combine(again.state.trainable, again.frozen))
    if "lora" not in reference:  # fresh adapters, which change nothing
        separate.pop("lora", None)
    with jax.set_mesh(one_device()):
        batch = {key: value[0] for key, value in place_batch(one_device(), loader.batch(0), 1).items()}
        unembed = make_unembed(program.model)
        logps = jax.jit(lambda variables: token_logps(program.model, unembed, variables, batch, None))
        theirs = np.asarray(logps(reference))
        np.testing.assert_array_equal(theirs, np.asarray(logps(separate)))
        assert np.abs(theirs - np.asarray(logps(policy))).max() > 0.01


def test_an_adapter_gone_on_from_is_its_own_reference_and_not_the_base(root):
    """Switching the adapter off would compare with the base, from which the policy is already far."""
    program, start, loader = begun(config_of(root, **{"adapter.source": str(root / "sft")}))
    with jax.set_mesh(one_device()):
        batch = {key: value[0] for key, value in place_batch(one_device(), loader.batch(0), 1).items()}
        without = {name: part for name, part in start.frozen.items() if name != REFERENCE}
        loss = jax.jit(program.objective)(tree.combine(start.state.trainable, without), batch, None)
    assert abs(float(loss.metrics["rewards/margins"][0])) > 0.1


@pytest.mark.parametrize("name", ["gone on from", *(pytest.param(name, marks=pytest.mark.slow) for name in RESUMED)])
def test_a_resumed_run_has_the_reference_it_began_with(name, root, tmp_path):
    changes = changes_of(name, root)
    cadence = {"log_every": 1, "checkpoint_every": 2, "data.checks": "off"}
    assert train.train(config_of(root, **changes, **cadence), tmp_path / "run") == 0
    whole = metrics.read(tmp_path / "run/metrics.jsonl")
    assert train.train(config_of(root, **changes, **cadence, **{"checkpoint.resume_step": 2}), tmp_path / "run") == 0
    for before, after in zip(whole, metrics.read(tmp_path / "run/metrics.jsonl"), strict=True):
        assert {key: after[key] for key in ("loss", "rewards/margins", "logps/chosen")} == {
            key: before[key] for key in ("loss", "rewards/margins", "logps/chosen")
        }
    assert whole[-1]["rewards/margins"] > whole[0]["rewards/margins"] == 0
