"""GRPO and its kin against their formulas in float64, and what a step of them may depend on."""

import functools
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.tiny import batch_of, documents, logits, numpy_params, spec

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import means
from ftjax.objectives.policy import LOSSES, make_policy, policy_loss
from ftjax.objectives.reference import frozen_with_reference

LONGEST = 20
MODEL = Decoder(spec())
params_of = functools.cache(functools.partial(numpy_params, MODEL))


def settings(**changes):
    return ConfigDict(configs.defaults().objective.to_dict() | changes)


def add(trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *jax.device_get(trees))


def expected(name, config, completions, moved=None, counts=None):
    """(mean loss, metrics) of completions, each (log p, when sampled, of the reference, advantage), by the papers.

    moved: other log p of each, at which the weights of cispo stay what they are. counts: what each token's loss does.
    """
    upper, sums, tokens, clips = config.epsilon_high or config.epsilon, [], 0, []
    for i, (fixed, sampled, reference, advantage) in enumerate(completions):
        logps = fixed if moved is None else moved[i]
        total, low, high = [], [], []
        for at, logp in enumerate(logps):
            difference, constant = logp - sampled[at], fixed[at] - sampled[at]
            if config.importance == "sequence":
                difference, constant = np.mean(logps - sampled), np.mean(fixed - sampled)
            if config.importance == "product":
                difference = np.sum(logps - sampled)
            ratio = np.exp(difference)
            if name == "cispo":
                loss = -min(np.exp(constant), upper) * advantage * logp
                high.append(ratio > upper and advantage > 0)
            elif name == "sapo":
                tau = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
                loss = -4 / tau / (1 + np.exp(-tau * (ratio - 1))) * advantage
            else:
                most = min(max(ratio, 1 - config.epsilon), 1 + upper)
                loss = -min(ratio * advantage, most * advantage)
                low.append(ratio < 1 - config.epsilon and advantage < 0)
                high.append(ratio > 1 + upper and advantage > 0)
            loss *= 1 if counts is None else counts[i][at]
            r = np.exp(reference[at] - logp)
            total.append(loss + config.kl_coef * (r - 1 - np.log(r)))
        sums.append(total)
        tokens += len(logps)
        clips.append((low, high))
    if name in ("grpo", "sapo"):
        loss = np.mean([np.mean(total) for total in sums])
    elif name == "dr_grpo":
        loss = np.sum([np.sum(total) / LONGEST for total in sums]) / len(completions)
    else:
        loss = np.sum([np.sum(total) for total in sums]) / tokens

    by_token = lambda values: np.concatenate(values).mean()  # noqa: E731
    differences = [np.abs(one[0] - one[1]) for one in completions]
    metrics = {"sampling/logp_difference_mean": by_token(differences)}
    if config.kl_coef:
        metrics["kl"] = by_token([np.exp(one[2] - one[0]) - 1 - (one[2] - one[0]) for one in completions])
    if name == "sapo":
        return loss, metrics
    # Where there is one ratio of a completion it is one thing that is clipped or not.
    share = by_token if config.importance == "token" else lambda values: np.mean([value[0] for value in values])
    low, high = zip(*clips, strict=True)
    if name == "cispo":
        return loss, metrics | {"cispo_clip_ratio": share(high)}
    metrics |= {"clip_ratio/low_mean": share(low), "clip_ratio/high_mean": share(high)}
    return loss, metrics | {"clip_ratio/region_mean": metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]}


def batch_with(batch, advantages, sampled_logps):
    return batch | {"advantages": advantages.astype(np.float32), "sampled_logps": sampled_logps.astype(np.float32)}


# Rows of completions. The third has trained tokens on both sides of others, as around what a tool says; the fifth has
# none at all; all are followed by padding. One advantage is 0.
ROWS = [[9, 6, 12], [14, 8], [5, 7, 6]]
ADVANTAGES = [1.3, -0.7, 0.9, -1.6, 5.0, 0.0, 0.4, -0.5]


@functools.cache
def drawn():
    """(batch [3, 32], log p, log p of the reference, where each completion is trained on: [(row, columns)])"""
    rng = np.random.default_rng(3)
    docs = iter(documents(5, [length for row in ROWS for length in row]))
    docs = [[next(docs) for _ in row] for row in ROWS]
    docs[0][2][1][6:9] = False
    docs[1][1][1][:] = False
    batch = batch_of(docs, 32)
    shape, trained = batch["weights"].shape, batch["weights"] != 0
    logps, advantages = -rng.exponential(2.0, shape), np.full(shape, np.nan)
    sampled, reference = (logps + 0.4 * rng.standard_normal(shape) for _ in range(2))
    places, number = [], 0
    for row, lengths in enumerate(ROWS):
        for segment in range(1, len(lengths) + 1):
            columns = np.flatnonzero(trained[row] & (batch["segment_ids"][row] == segment))
            advantages[row, columns] = ADVANTAGES[number]
            places += [(row, columns)] if len(columns) else []
            number += 1
    sampled[0, 1], advantages[1, -1] = -np.inf, np.inf  # of a prompt, and of padding
    arrays = (logps, sampled, reference)
    logps, sampled, reference = (np.where(trained, array, np.nan).astype(np.float32) for array in arrays)
    assert len(places) == 7
    return batch_with(batch, advantages, sampled), logps, reference, places


def completions_of(batch, logps, reference, places):
    arrays = [np.float64(array) for array in (logps, batch["sampled_logps"], reference, batch["advantages"])]
    return [(*(array[row, columns] for array in arrays[:3]), arrays[3][row, columns[0]]) for row, columns in places]


@functools.cache
def gradient_of(name, importance, kl_coef, **changes):
    config = settings(importance=importance, kl_coef=kl_coef, **changes)

    def mean(logps, reference, batch):
        loss = policy_loss(name, logps, reference if kl_coef else None, batch, config, LONGEST)
        return loss.sum / loss.weight, loss

    return config, jax.value_and_grad(mean, has_aux=True)


BOUNDS = {name: {"epsilon_high": 1.1 if name == "cispo" else 0.0 if name == "bnpo" else 0.3} for name in LOSSES}
BOUNDS["sapo"] = {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.6}


KINDS = [(name, kind, coef) for name in LOSSES for kind in ("token", "sequence") for coef in (0.0, 0.3)]


@pytest.mark.parametrize(("name", "importance", "kl_coef"), [*KINDS, ("grpo", "product", 0.0)])
def test_loss_gradient_and_metrics_are_the_formulas_whatever_stands_elsewhere(name, importance, kl_coef):
    batch, logps, reference, places = drawn()
    config, function = gradient_of(name, importance, kl_coef, **BOUNDS[name])
    (value, loss), gradient = function(logps, reference, batch)
    completions = completions_of(batch, logps, reference, places)
    wanted, metrics = expected(name, config, completions)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    got = means(loss)
    assert got.keys() == metrics.keys() | {"loss"}
    for metric in metrics:
        np.testing.assert_allclose(got[metric], metrics[metric], rtol=1e-5, err_msg=metric)
        assert metric.startswith("cispo") or not metric.startswith("clip") or 0 < metrics[metric] < 1

    slopes, step = np.zeros(logps.shape), 1e-6
    fixed = [one[0] for one in completions]
    for i, (row, columns) in enumerate(places):
        for at, column in enumerate(columns):
            ends = []
            for sign in (1, -1):
                moved = [*fixed[:i], fixed[i] + sign * step * (np.arange(len(columns)) == at), *fixed[i + 1 :]]
                ends.append(expected(name, config, completions, moved)[0])
            slopes[row, column] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(slopes).max() > 1e-2
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-5 * np.abs(slopes).max())


@pytest.mark.parametrize(
    ("name", "importance"), [*[(name, "token") for name in LOSSES], ("grpo", "sequence"), ("grpo", "product")]
)
def test_what_drew_the_tokens_is_corrected_for_and_the_policy_held_near_what_it_was(name, importance):
    """Hilton et al. 2021: ratios to one policy, weights that lead to it from another."""
    batch, logps, reference, places = drawn()
    there, rng = batch["weights"] != 0, np.random.default_rng(7)
    near = np.where(there, batch["sampled_logps"], np.nan)
    further = {
        "old_logps": near,
        "correction": np.where(there, rng.uniform(0, 2, there.shape), np.nan).astype(np.float32),
        "sampled_logps": np.where(there, near + 5, np.nan),  # of which a ratio would be clipped everywhere
    }
    coef = 0.0 if importance == "product" else 0.3
    config, function = gradient_of(name, importance, coef, **BOUNDS[name])
    (value, loss), gradient = function(logps, reference, batch | further)
    completions = completions_of(batch, logps, reference, places)
    counts = [np.float64(further["correction"][row, columns]) for row, columns in places]
    np.testing.assert_allclose(value, expected(name, config, completions, counts=counts)[0], rtol=1e-5)
    (_, plain), _ = function(logps, reference, batch)
    assert [m for m in means(loss) if means(loss)[m] != pytest.approx(float(means(plain)[m]))] == [
        *("loss", "sampling/logp_difference_mean")
    ]
    fixed, step = [one[0] for one in completions], 1e-6
    for i, (row, columns) in enumerate(places):
        at, ends = len(columns) - 1, []
        for sign in (1, -1):
            moved = [*fixed[:i], fixed[i] + sign * step * (np.arange(len(columns)) == at), *fixed[i + 1 :]]
            ends.append(expected(name, config, completions, moved, counts)[0])
        np.testing.assert_allclose(gradient[row, columns[at]], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_counts_what_the_sum_is_over(name):
    batch, logps, _, places = drawn()
    loss = policy_loss(name, logps, None, batch, settings(), LONGEST)
    tokens, by_token = sum(len(columns) for _, columns in places), name in ("dapo", "bnpo", "cispo")
    assert tokens == int(batch["weights"].sum())
    assert float(loss.weight) == (tokens if by_token else len(places))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_completion_whose_advantage_is_0_counts_and_its_kl_holds_it(name, importance):
    batch, logps, reference, places = drawn()
    row, columns = places[4]
    assert np.all(batch["advantages"][row, columns] == 0)
    _, without = gradient_of(name, importance, 0.0)
    _, held = gradient_of(name, importance, 0.3)
    assert not np.asarray(without(logps, reference, batch)[1])[row, columns].any()
    (_, loss), gradient = held(logps, reference, batch)
    assert np.asarray(gradient)[row, columns].all()
    assert float(loss.weight) == (len(places) if name == "grpo" else batch["weights"].sum())


def alone(arrays, places):
    """The same completions, one to a row; of the shape of `arrays`, so that nothing compiles anew."""
    out = {name: np.zeros_like(array) for name, array in arrays.items()}
    for i, (row, columns) in enumerate(places):
        document = arrays["segment_ids"][row] == arrays["segment_ids"][row, columns[0]]
        for name, array in arrays.items():
            out[name][i, : document.sum()] = array[row, document]
    out["segment_ids"] = np.minimum(out["segment_ids"], 1)
    return out


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("name", LOSSES)
def test_sums_do_not_depend_on_rows_or_micro_batches(name, importance):
    batch, logps, reference, places = drawn()
    config = settings(importance=importance, kl_coef=0.3, **BOUNDS[name])

    def total(arrays):
        function = lambda logps: policy_loss(name, logps, arrays["reference"], arrays, config, LONGEST)  # noqa: E731
        gradient = jax.grad(lambda logps: function(logps).sum)(arrays["logps"])
        return function(arrays["logps"]), np.asarray(gradient)[arrays["weights"] != 0]  # completion by completion

    packed = batch | {"logps": logps, "reference": reference}
    micro_batches = [alone(packed, part) for part in (places[:2], places[2:5], places[5:])]
    whole, slopes = total(packed)
    losses, gradients = zip(*map(total, micro_batches), strict=True)
    for ours, theirs in zip(jax.tree.leaves(add(list(losses))), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients), slopes, rtol=1e-5, atol=1e-6)


# Of the whole model: five completions, in rows and micro-batches.
DOCUMENTS = documents(0, [9, 12, 7, 10, 8])
OWN = [0.8, -1.1, 0.5, 0.0, -0.3]
LAYOUTS = {
    "packed": [[[0, 1, 2], [3, 4]]],
    "alone": [[[3], []], [[0], [4]], [[2], [1]]],
    "three micro-batches": [[[0, 2], []], [[1], [3]], [[], [4]]],
}


def batch_in(rows, temperature, moved=0.0):
    """A batch whose `sampled_logps` are what the policy says, or up to `moved` off; NaN where nothing is trained."""
    batch = batch_of([[DOCUMENTS[i] for i in row] for row in rows], 36)
    there = batch["weights"] != 0
    advantages = np.full(there.shape, np.nan)
    for b, row in enumerate(rows):
        values = np.repeat([OWN[i] for i in row], [len(DOCUMENTS[i][0]) for i in row])
        advantages[b, : len(values)] = values
    sampled = logps_of(0, batch, temperature) + moved * np.sin(7.0 * batch["targets"] + batch["positions"])
    return batch_with(batch, *(np.where(there, array, np.nan) for array in (advantages, sampled)))


def logps_of(seed, batch, temperature):
    every = distribution(seed, batch, temperature)
    return np.take_along_axis(every, batch["targets"][..., None], -1)[..., 0]


def distribution(seed, batch, temperature):
    """float64 [B, T, vocab]: log p at the temperature."""
    raw = np.float64(logits(MODEL, {"params": params_of(seed)}, batch)) / temperature
    return raw - np.log(np.exp(raw).sum(-1, keepdims=True))


def objective_of(temperature, **changes):
    """(parameters, batch) -> (sum, Loss), of dapo"""
    objective = make_policy(MODEL, settings(**changes), temperature=temperature, max_new_tokens=LONGEST)
    frozen = frozen_with_reference({}, {"params": params_of(1)})

    def total(params, batch):
        loss = objective({"params": params} | frozen, batch, None)
        return loss.sum, loss

    return total


KL, WARM = 0.2, 0.7


@functools.cache
def compiled():
    return jax.jit(jax.value_and_grad(objective_of(WARM, kl_coef=KL), has_aux=True))


def step_of(micro_batches):
    """(the summed Loss, the gradients of its sum), at temperature WARM with a KL."""
    found = [compiled()(params_of(0), batch) for batch in micro_batches]
    return add([loss for (_, loss), _ in found]), add([gradients for _, gradients in found])


@pytest.mark.parametrize("temperature", [WARM, 1.0])
def test_on_policy_the_ratio_is_1_at_the_temperature_of_sampling(temperature):
    batch = batch_in(LAYOUTS["packed"][0], temperature)
    # Without a gradient it compiles in half the time.
    loss = step_of([batch])[0] if temperature == WARM else jax.jit(objective_of(1.0))(params_of(0), batch)[1]
    found, there = means(loss), batch["weights"] != 0
    assert found["sampling/logp_difference_mean"] < 1e-6
    assert found["clip_ratio/low_mean"] == found["clip_ratio/high_mean"] == found["clip_ratio/region_mean"] == 0
    every = distribution(0, batch, temperature)
    np.testing.assert_allclose(found["entropy"], -(np.exp(every) * every).sum(-1)[there].mean(), rtol=1e-5)
    mean = -batch["advantages"][there].mean()
    if temperature == WARM:
        less = (logps_of(1, batch, temperature) - logps_of(0, batch, temperature))[there]
        np.testing.assert_allclose(found["kl"], np.mean(np.exp(less) - less - 1), rtol=1e-5)
        mean += KL * np.mean(np.exp(less) - less - 1)
    np.testing.assert_allclose(found["loss"], mean, rtol=1e-5)


def test_gradients_of_the_model_do_not_depend_on_packing_or_micro_batches():
    steps = [step_of([batch_in(rows, WARM, moved=0.5) for rows in batches]) for batches in LAYOUTS.values()]
    (whole, slopes), *others = steps
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    assert largest > 1e-2
    for loss, gradients in others:
        for ours, theirs in zip(jax.tree.leaves(loss), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * largest)


def test_a_step_without_any_sampled_token_is_0():
    batch = batch_in(LAYOUTS["packed"][0], WARM)
    loss, gradients = step_of([batch | {"weights": np.zeros_like(batch["weights"])}])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((loss, gradients)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": ("sigmoid",)}, "'sigmoid' is no loss"),
        ({"loss": ("grpo", "dapo")}, "name one of grpo, dr_grpo, dapo, bnpo, cispo, sapo, without a weight"),
        ({"loss": (("grpo", 0.5),)}, "without a weight"),
        ({"loss": ("sapo",), "epsilon_high": 0.28}, "epsilon_high=0.28 does nothing with the loss sapo; leave it"),
        ({"sapo_temperature_neg": 1.1}, "sapo_temperature_neg=1.1 does nothing with the loss dapo; leave it"),
    ],
)
def test_losses_that_have_no_sum_and_settings_without_effect_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_policy(MODEL, settings(**changes), max_new_tokens=LONGEST)


def test_greedy_answers_are_refused():
    with pytest.raises(UserError, match="not at temperature 0; 1 is usual"):
        make_policy(MODEL, settings(), temperature=0.0, max_new_tokens=LONGEST)
