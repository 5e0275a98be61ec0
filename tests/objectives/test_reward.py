"""Reward models against transformers' and TRL's own, however pairs lie in rows; ensembles; what is kept of rewards."""

import collections
import functools
import itertools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, torch_scores

from ftjax import config as configs
from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import means, merged
from ftjax.objectives.reward import bootstrap, log_likelihood, make_reward
from ftjax.training.state import normalization, reward_sums

MODEL = Decoder(spec())
PAIRS = [documents(seed, [9 + seed, 6 + 2 * seed]) for seed in range(3)]  # (chosen, rejected) each
MARGINS = (0.5, 0.0, -1.25)


def settings(**changes):
    config = configs.defaults().objective
    config.update({"name": "reward"} | changes)
    return config


def variables_of(heads=1, seed=0):
    kernel = np.random.default_rng(seed).standard_normal((CONFIG["hidden_size"], heads)).astype(np.float32)
    return {"params": numpy_params(MODEL, seed), "heads": {"score": {"kernel": kernel}}}


def batch_with(rows, left=False):
    """Rows of pairs, by their numbers, all batches of one shape."""
    batch = batch_of([[document for i in row for document in PAIRS[i]] for row in rows], 44, left)
    batch["labels"] = np.zeros(batch["tokens"].shape, np.float32)
    for r, row in enumerate(rows):
        for place, i in enumerate(row):
            batch["labels"][r][np.isin(batch["segment_ids"][r], [2 * place + 1, 2 * place + 2])] = MARGINS[i]
    return batch


@functools.cache
def compiled(**changes):
    return jax.jit(make_reward(MODEL, settings(**changes)))


def loss_of(variables, batch, rng=None, **changes):
    return jax.device_get(compiled(**changes)(variables, batch, rng))


@functools.cache
def witness():
    """(loss sum, gradients by parameter, rewards [pairs, 2]) of transformers' model, with all that a loss may have."""
    variables = variables_of()
    model = torch_scores(CONFIG, variables["params"], variables["heads"]["score"]["kernel"])
    rewards = [
        [model(input_ids=torch.tensor(tokens, dtype=torch.long)[None]).logits[0, 0].double() for tokens, _ in pair]
        for pair in PAIRS
    ]
    total = 0.0
    for (chosen, rejected), margin in zip(rewards, MARGINS):
        total = total - torch.log(0.9 * torch.sigmoid(chosen - rejected - margin) + 0.05)
        total = total + 0.3 * (chosen + rejected) ** 2
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return total.item(), gradients, np.array([[r.item() for r in pair] for pair in rewards])


LAYOUTS = {
    "packed": (((0, 1), (2,), (), ()), False),
    "alone": (((2,), (0,), (), (1,)), False),
    "on the left": (((2,), (0,), (), (1,)), True),
}


@functools.cache
def with_gradients():
    objective = make_reward(MODEL, settings(center_coef=0.3, label_noise=0.1))

    def total(variables, batch):
        loss = objective(variables, batch, None)
        return loss.sum, loss

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_metrics_are_those_of_transformers_however_pairs_lie_in_rows(layout, record_figure):
    total, gradients, rewards = witness()
    variables = variables_of()
    ours, loss = jax.device_get(with_gradients()(variables, batch_with(*LAYOUTS[layout])))
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert float(loss.weight) == 3
    difference = rewards[:, 0] - rewards[:, 1]
    likelihood = 0.9 / (1 + np.exp(-difference)) + 0.05
    expected = {
        "accuracy": (difference > 0).sum(),
        "margin": difference.sum(),
        "mean_reward": rewards.mean(1).sum(),
        "brier": ((1 - likelihood) ** 2).sum(),
        "confidence": np.maximum(likelihood, 1 - likelihood).sum(),
    }
    assert loss.metrics.keys() == expected.keys()
    for name, (value, weight) in loss.metrics.items():
        assert float(weight) == 3, name
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss.ranges["reward"], (rewards.min(), rewards.max()), rtol=1e-5)
    np.testing.assert_allclose(ours["heads"]["score"]["kernel"].T, gradients["score.weight"], rtol=1e-4, atol=1e-5)
    theirs = from_torch({name: leaf for name, leaf in gradients.items() if name != "score.weight"}, variables["params"])
    flat = tree.flatten(ours["params"])
    largest = max(np.abs(theirs[path]).max() for path in theirs)
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs) / largest
    assert worst < 1e-5
    record_figure(f"gradients, {layout}", worst)


def test_the_loss_of_a_soft_label_is_torchs_cross_entropy_with_it_and_margins_stay():
    variables, batch, doubts = variables_of(), batch_with(((0, 1), (2,), (), ())), (0.25, 0.0, 0.6)
    margins, rewards = np.array([0.0, 0.5, 0.0]), witness()[2]
    for row, place, i in ((0, 0, 0), (0, 1, 1), (1, 0, 2)):
        for segment, label in ((2 * place + 1, margins[i]), (2 * place + 2, margins[i] - doubts[i])):
            batch["labels"][row][batch["segment_ids"][row] == segment] = label
    loss = loss_of(variables, batch)
    difference, soft = torch.tensor(rewards[:, 0] - rewards[:, 1] - margins), 1 - torch.tensor(doubts).double()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(difference, soft, reduction="sum")
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)
    likelihood = torch.sigmoid(torch.tensor(rewards[:, 0] - rewards[:, 1]))
    np.testing.assert_allclose(loss.metrics["brier"][0], ((soft - likelihood) ** 2).sum(), rtol=1e-5)


def test_a_reward_is_read_at_the_last_real_token_even_where_padding_and_turns_are_of_end_tokens():
    """trl#6952, trl#2778: 0 is the padding's id in every batch, and here that of the ends of turns and answers too."""
    ending = np.array([5, 0, 7, 8, 0], np.int32)  # a turn that ends, an answer that does
    other = np.array([5, 0, 7, 0], np.int32)
    pair = [(tokens, np.arange(len(tokens)) > 1) for tokens in (ending, other)]
    found = []
    for rows, left in (([pair, [], [], []], False), ([[], [], [], pair], True)):
        batch = batch_of(rows, 44, left)
        batch["labels"] = np.zeros(batch["tokens"].shape, np.float32)
        found.append(loss_of(variables_of(), batch).ranges["reward"])
    model = torch_scores(CONFIG, variables_of()["params"], variables_of()["heads"]["score"]["kernel"])
    rewards = [
        model(input_ids=torch.tensor(tokens, dtype=torch.long)[None]).logits.item() for tokens in (ending, other)
    ]
    np.testing.assert_allclose(found, [sorted(rewards)] * 2, rtol=1e-5)


def test_each_head_of_an_ensemble_learns_from_its_own_bootstrap():
    variables = variables_of(heads=3)
    batch = batch_with(((0,), (1,), (2,), ()))
    weights = np.asarray(bootstrap(batch, 3, 0))[:3, 0]
    in_training = loss_of(variables, batch, jax.random.key(5), ensemble=3)
    held_out = loss_of(variables, batch, ensemble=3)
    alone = np.zeros((3, 3))
    for head, pair in itertools.product(range(3), range(3)):
        one = variables | {"heads": {"score": {"kernel": variables["heads"]["score"]["kernel"][:, [head]]}}}
        alone[pair, head] = loss_of(one, batch_with(((pair,), (), (), ()))).sum
    np.testing.assert_allclose(in_training.sum, (alone * weights).sum() / 3, rtol=1e-5)
    np.testing.assert_allclose(held_out.sum, alone.sum() / 3, rtol=1e-5)  # an evaluation has no bootstrap
    assert set(weights.ravel()) >= {0.0, 1.0}
    assert float(held_out.metrics["disagreement"][0]) > 0


def test_a_pair_has_the_same_weight_in_every_batch_and_another_for_each_seed():
    packed = np.asarray(bootstrap(batch_with(LAYOUTS["packed"][0]), 64, 3))
    for layout in ("alone", "on the left"):
        alone = np.asarray(bootstrap(batch_with(*LAYOUTS[layout]), 64, 3))
        np.testing.assert_array_equal(alone[[1, 3, 0], 0], [packed[0, 0], packed[0, 1], packed[1, 0]])
    assert not np.array_equal(packed, bootstrap(batch_with(LAYOUTS["packed"][0]), 64, 4))
    swapped = np.asarray(bootstrap(batch_of([PAIRS[0][::-1], [], [], []], 44), 64, 3))
    assert not np.array_equal(swapped[0, 0], packed[0, 0])


def test_weights_of_the_bootstrap_are_poisson():
    rng = np.random.default_rng(0)
    tokens = np.zeros((400, 8), np.int32)
    tokens[:, :4] = rng.integers(0, 3, (400, 4))  # few tokens, so that pairs differ in little
    tokens[:, 0] = np.arange(400)
    batch = {"tokens": tokens, "segment_ids": np.tile([1, 1, 2, 2, 0, 0, 0, 0], (400, 1)).astype(np.int32)}
    batch["positions"] = np.tile([0, 1, 0, 1, 0, 0, 0, 0], (400, 1)).astype(np.int32)
    weights = np.asarray(bootstrap(batch, 50, 0))[:, 0]  # [400, 50]
    share = np.bincount(weights.astype(int).ravel(), minlength=12)[:6] / weights.size
    expected = np.exp(-1) / np.array([1, 1, 2, 6, 24, 120])
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / weights.size))
    correlation = np.corrcoef(weights.T) - np.eye(50)
    assert np.abs(correlation).max() < 5 / np.sqrt(400)


def test_label_noise_is_stable_for_any_difference():
    differences = np.array([-1e4, -50.0, -1.0, 0.0, 3.0, 1e4], np.float32)
    value, slope = jax.vmap(jax.value_and_grad(lambda d: log_likelihood(d, 0.1)))(differences)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-differences.astype(np.float64)))
    likelihood = 0.9 * sigmoid + 0.05
    np.testing.assert_allclose(value, np.log(likelihood), rtol=1e-5)
    np.testing.assert_allclose(slope, 0.9 * sigmoid * (1 - sigmoid) / likelihood, rtol=1e-5, atol=1e-12)


def test_smallest_and_largest_reward_are_those_of_all_micro_batches():
    parts = [loss_of(variables_of(), batch_with((row, (), (), ()))) for row in ((0,), (1,), (2,), ())]
    whole = loss_of(variables_of(), batch_with(((0,), (1,), (2,), ())))
    together = merged(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts))
    np.testing.assert_allclose(together.ranges["reward"], whole.ranges["reward"], rtol=1e-6)
    np.testing.assert_allclose(together.sum, whole.sum, rtol=1e-6)


def test_rewards_are_normalized_by_those_of_the_last_steps():
    variables, kept = variables_of(heads=3), reward_sums()
    value = kept.init(variables)
    np.testing.assert_array_equal(normalization(value), [[0, 0, 0], [1, 1, 1]])
    told = loss_of(variables, batch_with(((0,), (1,), (2,), ())), ensemble=3)
    model = torch_scores(CONFIG, variables["params"], variables["heads"]["score"]["kernel"])
    tokens = [torch.tensor(tokens, dtype=torch.long)[None] for pair in PAIRS for tokens, _ in pair]
    with torch.no_grad():
        rewards = np.array([model(input_ids=one).logits[0].numpy() for one in tokens], np.float64)
    for _ in range(3):  # the same rewards at every step: how often changes nothing
        value = kept.update(value, variables, variables, told.kept)
        np.testing.assert_allclose(normalization(value), [rewards.mean(0), rewards.std(0)], rtol=1e-5)
    shifted = {"rewards": told.kept["rewards"] | {"sum": told.kept["rewards"]["sum"] + 60.0}}
    for _ in range(100):
        value = kept.update(value, variables, variables, shifted)
    np.testing.assert_allclose(normalization(value)[0], rewards.mean(0) + 10, rtol=1e-2)


def by_trl(margins):
    """(loss, metrics, gradients by parameter) of TRL's own trainer, whose batch is padded on the right with 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import reward_trainer
    variables = variables_of()
    model = torch_scores(CONFIG, variables["params"], variables["heads"]["score"]["kernel"])
    model.config.pad_token_id = 0
    rows = [{"chosen_ids": pair[0][0], "rejected_ids": pair[1][0]} for pair in PAIRS]
    if margins:
        rows = [row | {"margin": margin} for row, margin in zip(rows, MARGINS)]
    inputs = reward_trainer.DataCollatorForPreference(pad_token_id=0)(rows)
    trainer = types.SimpleNamespace(
        model=model.train(),
        args=types.SimpleNamespace(center_rewards_coefficient=0.3 if margins else None),
        accelerator=types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"train": collections.defaultdict(list)},
        _tp_size=1,
        _total_train_tokens=0,
    )
    loss = reward_trainer.RewardTrainer.compute_loss(trainer, Marginless(model), inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    return loss.item(), metrics, {name: leaf.grad for name, leaf in model.named_parameters()}


class Marginless:
    """What TRL's trainer calls: it gives the margin to the model, too, which takes what it does not know."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, attention_mask, margin=None, use_cache=False):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.slow  # TRL takes seconds to import
@pytest.mark.parametrize("margins", [False, True], ids=["plain", "with margins and centering"])
def test_loss_metrics_and_gradients_are_trls(margins, record_figure):
    expected, metrics, gradients = by_trl(margins)
    objective = make_reward(MODEL, settings(center_coef=0.3 if margins else 0.0))

    def mean(variables, batch):
        loss = objective(variables, batch, None)
        return loss.sum / loss.weight, means(loss)

    batch = batch_with(LAYOUTS["packed"][0])
    batch["labels"] *= margins
    (ours, found), flat = jax.jit(jax.value_and_grad(mean, has_aux=True))(variables_of(), batch)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert metrics.keys() == found.keys() - {"loss", "brier", "confidence"}
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    head = gradients.pop("score.weight").numpy().T
    theirs = from_torch(gradients, flat["params"]) | {"head": head}
    flat = tree.flatten(flat["params"]) | {"head": flat["heads"]["score"]["kernel"]}
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs) / largest
    assert worst < 1e-5
    record_figure("loss, relative", abs(float(ours) / expected - 1))
    record_figure("gradients, of the largest", worst)
