"""The losses of PPO against their formulas in float64, and what a step of them may depend on."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.tiny import batch_of, documents, logits, numpy_params, spec

from ftjax import config as configs
from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import TOTALS, means
from ftjax.objectives.ppo import KL_COEF, make_ppo, make_ppo_totals, ppo_loss

MODEL = Decoder(spec())
DOCUMENTS = documents(5, [9, 6, 12, 14, 8])
ROWS, ALONE = [[0, 1, 2], [3, 4]], [[[3], []], [[0], [4]], [[2], [1]]]
TEMPERATURE = 0.7


def settings(**changes):
    return ConfigDict(configs.defaults().objective.to_dict() | changes)


def add(trees):
    return jax.tree.map(lambda *leaves: sum(leaves), *jax.device_get(trees))


def drawn(rows, **arrays):
    """A batch whose further arrays have the same numbers for a document wherever it stands, and NaN elsewhere."""
    batch = batch_of([[DOCUMENTS[i] for i in row] for row in rows], 32)
    there = batch["weights"] != 0
    for name, by_document in arrays.items():
        values = np.full(there.shape, np.nan, np.float32)
        for b, row in enumerate(rows):
            for segment, i in enumerate(row, 1):
                where = there[b] & (batch["segment_ids"][b] == segment)
                values[b, where] = by_document[i][DOCUMENTS[i][1]]
        batch[name] = values
    return batch


def noise(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(len(tokens)) for tokens, _ in DOCUMENTS]


NAMES = ("advantages", "sampled_logps", "values", "returns", "kl", "logps", "now")
OTHERS = dict(zip(NAMES, (noise(i, 0.4) for i in range(len(NAMES))), strict=True))


def expected(logps, values, batch, config):
    """(loss, metrics) over what is trained, float64"""
    there = batch["weights"] != 0
    advantages, old, old_values, returns = (
        np.float64(batch[name])[there] for name in ("advantages", "sampled_logps", "values", "returns")
    )
    apart = logps[there] - old
    old = np.float64(batch["old_logps"])[there] if "old_logps" in batch else old
    differences = logps[there] - old
    ratios, now = np.exp(differences), values[there]
    clipped = -advantages * np.minimum(np.maximum(ratios, 1 - config.epsilon), 1 + config.epsilon_high)
    near = np.minimum(np.maximum(now, old_values - config.value_clip), old_values + config.value_clip)
    counts = np.float64(batch["correction"])[there] if "correction" in batch else 1
    of_policy = (np.maximum(-advantages * ratios, clipped) * counts).mean()
    of_values = 0.5 * np.maximum((now - returns) ** 2, (near - returns) ** 2).mean()
    return of_policy + config.vf_coef * of_values, {
        "loss/policy_avg": of_policy,
        "loss/value_avg": of_values,
        "policy/approxkl_avg": 0.5 * np.mean(differences**2),
        "policy/clipfrac_avg": np.mean(clipped > -advantages * ratios),
        "val/clipfrac_avg": np.mean((near - returns) ** 2 > (now - returns) ** 2),
        "val/ratio": ratios.mean(),
        "sampling/logp_difference_mean": np.abs(apart).mean(),
    }


@pytest.mark.parametrize("corrected", [False, True])
def test_losses_metrics_and_gradients_are_the_formulas_whatever_stands_elsewhere(corrected):
    further = {"old_logps": noise(20, 0.4), "correction": np.abs(np.array(noise(21), object))} if corrected else {}
    config, batch = settings(epsilon_high=0.3, vf_coef=0.4), drawn(ROWS, **OTHERS, **further)
    there = batch["weights"] != 0

    def mean(logps, values):
        loss = ppo_loss(logps, values, batch, config)
        return loss.sum / loss.weight, loss

    (value, loss), gradients = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(batch["logps"], batch["now"])
    logps, values = np.float64(batch["logps"]), np.float64(batch["now"])
    wanted, metrics = expected(logps, values, batch, config)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    got = means(loss)
    assert got.keys() == metrics.keys() | {"loss"}
    for name in metrics:
        np.testing.assert_allclose(got[name], metrics[name], rtol=1e-5, err_msg=name)
        assert "clipfrac" not in name or 0 < metrics[name] < 1
    assert float(loss.kept[KL_COEF]["completions"]) == len(DOCUMENTS)
    np.testing.assert_allclose(loss.kept[KL_COEF]["kl"], batch["kl"][there].sum(dtype=np.float64), rtol=1e-5)

    step = 1e-6
    for gradient, which in zip(gradients, (0, 1), strict=True):
        assert not np.asarray(gradient)[~there].any()
        for place in np.argwhere(there):
            ends = []
            for sign in (1, -1):
                arrays = [logps.copy(), values.copy()]
                arrays[which][tuple(place)] += sign * step
                ends.append(expected(*arrays, batch, config)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient[tuple(place)], slope, rtol=1e-4, atol=1e-6)


@functools.cache
def compiled(ptx_coef=0.0):
    objective = make_ppo(MODEL, settings(ptx_coef=ptx_coef), temperature=TEMPERATURE)

    def total(variables, batch, totals=None):
        loss = objective(variables | ({TOTALS: totals} if totals else {}), batch, None)
        return loss.sum, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def variables():
    rng = np.random.default_rng(1)
    return {"params": numpy_params(MODEL, 0), "heads": {"value": {"kernel": np.float32(rng.normal(size=(32, 1)))}}}


def test_gradients_of_the_model_do_not_depend_on_packing_or_micro_batches():
    made = []
    for batches in ([ROWS], ALONE):
        given = [drawn(rows, **{name: OTHERS[name] for name in NAMES[:5]}) for rows in batches]
        found = [compiled()(variables(), batch) for batch in given]
        made.append((add([loss for (_, loss), _ in found]), add([gradients for _, gradients in found])))
    (whole, slopes), (loss, gradients) = made
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    assert np.abs(slopes["heads"]["value"]["kernel"]).max() > 1e-2
    for ours, theirs in zip(jax.tree.leaves(loss), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * largest)


def test_on_policy_the_ratio_is_1_at_the_temperature_of_sampling():
    batch = drawn(ROWS, **{name: OTHERS[name] for name in NAMES[:5]})
    raw = np.float64(logits(MODEL, {"params": numpy_params(MODEL, 0)}, batch)) / TEMPERATURE
    every = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    there = batch["weights"] != 0
    ours = np.take_along_axis(every, batch["targets"][..., None], -1)[..., 0]
    batch["sampled_logps"] = np.where(there, ours, np.nan).astype(np.float32)
    (_, loss), _ = compiled()(variables(), batch)
    found = means(loss)
    np.testing.assert_allclose(found["val/ratio"], 1, atol=1e-6)
    assert found["policy/clipfrac_avg"] == 0
    np.testing.assert_allclose(found["policy/entropy_avg"], -(np.exp(every) * every).sum(-1)[there].mean(), rtol=1e-5)


def test_texts_beside_completions_reach_only_their_own_loss_a_mean_over_their_tokens():
    texts, coef = (1, 4), 0.7
    given = {name: OTHERS[name] for name in NAMES[:5]}
    found = []
    for batches in ([ROWS], ALONE):
        with_texts = [drawn(rows, **given) for rows in batches]
        for batch, rows in zip(with_texts, batches, strict=True):
            number = np.array([[*row, *[-1] * (3 - len(row))] for row in rows])
            document = np.take_along_axis(number, np.maximum(batch["segment_ids"] - 1, 0), axis=1)
            is_text = np.isin(document, texts) & (batch["segment_ids"] > 0)
            batch["ptx"] = is_text.astype(np.float32)
            for name in NAMES[:5]:
                batch[name][is_text] = np.nan
        totals = add([make_ppo_totals(MODEL, settings(ptx_coef=coef))({}, batch) for batch in with_texts])
        steps = [compiled(coef)(variables(), batch, totals) for batch in with_texts]
        found.append((add([loss for (_, loss), _ in steps]), add([gradients for _, gradients in steps])))
    (whole, slopes), (loss, gradients) = found
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    for ours, theirs in zip(jax.tree.leaves((loss.sum, loss.metrics)), jax.tree.leaves((whole.sum, whole.metrics))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * largest)

    # The rest is the loss of the completions alone, and the texts' is the mean of -log p at temperature 1.
    alone = [[i for i in row if i not in texts] for row in ROWS]
    (_, without), their_slopes = compiled()(variables(), drawn(alone, **given))
    assert float(without.weight) == float(whole.weight) == float(totals["sampled"])
    for name in without.metrics:
        np.testing.assert_allclose(means(whole)[name], means(without)[name], rtol=1e-5, err_msg=name)
    batch = drawn([list(texts)])
    raw = np.float64(logits(MODEL, {"params": numpy_params(MODEL, 0)}, batch))
    every = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    nll = -np.take_along_axis(every, batch["targets"][..., None], -1)[..., 0][batch["weights"] != 0].mean()
    np.testing.assert_allclose(means(whole)["loss/ptx_avg"], nll, rtol=1e-5)
    np.testing.assert_allclose(means(whole)["loss"], means(without)["loss"] + coef * nll, rtol=1e-5)
    # The critic learns nothing from texts.
    value = slopes["heads"]["value"]["kernel"]
    np.testing.assert_allclose(value, their_slopes["heads"]["value"]["kernel"], atol=1e-5 * np.abs(value).max())
    assert np.abs(slopes["params"]["norm"]["scale"] - their_slopes["params"]["norm"]["scale"]).max() > 1e-2
