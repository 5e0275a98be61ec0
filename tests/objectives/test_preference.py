"""Learning from pairs against transformers' torch model: plain DPO, its reference, and how pairs lie in rows."""

import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, torch_llama

from ftjax import config as configs
from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.objectives import preference
from ftjax.objectives.logps import pair_sums, shared_weights
from ftjax.objectives.preference import make_preference, pair_weights
from ftjax.objectives.reference import frozen_with_reference

BETA = 0.3
MODEL = Decoder(spec())
PAIRS = [documents(seed, [9 + seed, 6 + 2 * seed]) for seed in range(3)]  # (chosen, rejected) each


def settings(**changes):
    config = configs.defaults()
    config.objective.update({"name": "dpo"} | changes)
    return config.objective


@functools.cache
def dpo():
    objective = make_preference(MODEL, settings(beta=BETA), (("sigmoid", 1.0),))
    return jax.jit(
        jax.value_and_grad(lambda params, frozen, batch: sums(objective, params, frozen, batch), has_aux=True)
    )


def sums(objective, params, frozen, batch):
    loss = objective({"params": params} | frozen, batch, None)
    return loss.sum, loss


def loss_of(policy, reference, batch):
    (_, loss), gradients = dpo()(policy, frozen_with_reference({}, {"params": reference}), batch)
    return jax.device_get(loss), jax.device_get(gradients)


def torch_logp(model, document):
    """log p of the trained tokens of a document, float64 above torch's float32 logits."""
    tokens, trained = document
    ids = torch.tensor(tokens, dtype=torch.long)
    logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
    return logps.gather(-1, ids[1:, None])[:, 0][torch.tensor(trained[1:])].sum()


@pytest.fixture(scope="module")
def witness():
    """(loss sum, gradients, metric sums) of the pairs, by torch alone."""
    policy, reference = (torch_llama(CONFIG, numpy_params(MODEL, seed)) for seed in (0, 1))
    total, metrics = 0, dict.fromkeys(("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"), 0.0)
    accuracy = 0
    for pair in PAIRS:
        ours = [torch_logp(policy, document) for document in pair]
        with torch.no_grad():
            theirs = [torch_logp(reference, document) for document in pair]
        rewards = [BETA * (one - other) for one, other in zip(ours, theirs)]
        total = total - torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
        accuracy += float(rewards[0] > rewards[1])
        for side, reward, logp in zip(("chosen", "rejected"), rewards, ours):
            metrics[f"rewards/{side}"] += reward.item()
            metrics[f"logps/{side}"] += logp.item()
    total.backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return total.item(), gradients, metrics | {"rewards/accuracies": accuracy}


# Two pairs in one row and one in the other, or each in its own, with an empty row; documents never see each other.
LAYOUTS = {
    "packed": lambda: batch_of([[*PAIRS[0], *PAIRS[1]], [*PAIRS[2]]], 44),
    "alone": lambda: batch_of([[*PAIRS[2]], [*PAIRS[0]], [], [*PAIRS[1]]], 30),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_metrics_are_torchs_however_pairs_lie_in_rows(layout, witness, record_figure):
    total, gradients, metrics = witness
    params = numpy_params(MODEL, 0)
    loss, ours = loss_of(params, numpy_params(MODEL, 1), LAYOUTS[layout]())
    assert float(loss.weight) == len(PAIRS)
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert loss.metrics.keys() == metrics.keys()
    for name, (value, weight) in loss.metrics.items():
        assert float(weight) == len(PAIRS), name
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    flat = tree.flatten(ours)
    theirs = from_torch(gradients, params)
    largest = max(np.abs(flat[path] - theirs[path]).max() for path in theirs)
    assert largest < 1e-5
    assert max(np.abs(theirs[path]).max() for path in theirs) > 0.1
    record_figure(f"gradients, {layout}", largest)


@pytest.mark.parametrize("ld_alpha", [1.0, 0.5])
def test_of_answers_that_the_policy_wrote_the_ratio_estimates_the_kl(witness, ld_alpha):
    """TRL's objective/kl, but for its padding: the mean over both answers, whole whatever ld_alpha counts."""
    policy, reference = ({"params": numpy_params(MODEL, seed)} for seed in (0, 1))
    objective = make_preference(MODEL, settings(beta=BETA, ld_alpha=ld_alpha), (("sigmoid", 1.0),), sampled=True)
    loss = jax.jit(objective)(policy | frozen_with_reference({}, reference), LAYOUTS["packed"](), None)
    _, _, metrics = witness
    value, weight = loss.metrics["objective/kl"]
    assert float(weight) == len(PAIRS)
    ratios = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / BETA
    assert float(value) == pytest.approx(ratios / 2, rel=1e-5, abs=1e-5)


def test_a_policy_that_is_its_reference_has_margin_0_and_loss_ln_2():
    params = numpy_params(MODEL, 0)
    loss, gradients = loss_of(params, params, LAYOUTS["packed"]())
    assert float(loss.sum) / len(PAIRS) == pytest.approx(math.log(2), rel=1e-6)
    assert float(loss.metrics["rewards/margins"][0]) == 0
    assert float(loss.metrics["rewards/accuracies"][0]) == 0  # strictly greater
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_what_a_pair_counts_is_the_formula_of_wpo_and_has_no_gradient():
    """Two pairs in the first row, one in the second, against float64 NumPy by token."""
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 0], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0]], np.int32)
    scored = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]], np.float32)
    rng = np.random.default_rng(0)
    logps, squares = (-rng.uniform(0.1, 3, (2, *segments.shape)) * scored).astype(np.float32)

    def total(logps, squares):
        weights = pair_weights(logps, squares, pair_sums(scored, segments), segments)
        return weights.sum(), weights

    (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(logps, squares)
    for (row, pair), sides in {(0, 0): (1, 2), (0, 1): (3, 4), (1, 0): (1, 2)}.items():
        where = [(segments[row] == side) & (scored[row] > 0) for side in sides]
        means = [(logps[row].astype(np.float64) - squares[row])[its].mean() for its in where]
        assert found[row, pair] == pytest.approx(np.exp(sum(means)), rel=1e-6)
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.slow
def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them(record_figure):
    """Values and gradients against torch's autograd in float64 above its logits, for pairs that share a row."""
    policy, reference = (torch_llama(CONFIG, numpy_params(MODEL, seed)) for seed in (0, 1))
    total, weights = 0, []
    for pair in PAIRS:
        ours = [torch_logp(policy, document) for document in pair]
        with torch.no_grad():
            theirs = [torch_logp(reference, document) for document in pair]
            aligned = [torch_aligned(policy, document) for document in pair]
        weights.append(float(torch.exp(sum(aligned))))
        margin = BETA * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
        total = total - weights[-1] * torch.nn.functional.logsigmoid(margin)
    total.backward()
    assert max(weights) / min(weights) > 1.5

    objective = make_preference(MODEL, settings(beta=BETA, weighting="wpo"), (("sigmoid", 1.0),))
    gradient = jax.jit(jax.value_and_grad(lambda *its: sums(objective, *its), has_aux=True))
    params, frozen = numpy_params(MODEL, 0), frozen_with_reference({}, {"params": numpy_params(MODEL, 1)})
    (ours, loss), found = gradient(params, frozen, LAYOUTS["packed"]())
    np.testing.assert_allclose(ours, total.item(), rtol=1e-5)
    assert float(loss.weight) == len(PAIRS)
    theirs = from_torch({name: parameter.grad for name, parameter in policy.named_parameters()}, params)
    flat = tree.flatten(found)
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs)
    assert worst < 1e-5 * max(np.abs(theirs[path]).max() for path in theirs)
    record_figure("gradients", worst)


def torch_aligned(model, document):
    """The mean over an answer's tokens of log p(token) - log sum_v p(v)^2."""
    tokens, trained = document
    ids = torch.tensor(tokens, dtype=torch.long)
    logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].double(), -1)
    aligned = logps.gather(-1, ids[1:, None])[:, 0] - torch.log((logps.exp() ** 2).sum(-1))
    return aligned[torch.tensor(trained[1:])].mean()


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "odds_ratio"])
def test_what_a_length_is_divided_by_is_the_number_of_scored_tokens(name, monkeypatch):
    """Not that of the document's tokens or of its answer's, of which the first may be unscored: where every token says
    the same, answers of any length do, and there is no margin."""
    monkeypatch.setattr(preference, "of_tokens", lambda *its: SimpleNamespace(loss=1.0 * (its[3]["weights"] != 0)))
    monkeypatch.setattr(preference, "token_logps", lambda *its: -3.0 * its[3]["weights"])
    rows = [[*PAIRS[0], *PAIRS[1]], [*PAIRS[2]]]
    for _, trained in PAIRS[1]:
        assert trained.sum() > 3
    batch = batch_of(rows, 44)
    batch["weights"][0, np.flatnonzero(batch["weights"][0])[0]] = 0  # a token of an answer that is not scored
    reference = name in ("ipo", "sigmoid_norm")
    margin = {"gamma": 0.0} if name == "simpo" else {}
    config = settings(beta=0.5, loss=(name,), name="dpo" if reference else "cpo", **margin)
    loss = make_preference(MODEL, config, (), reference)({"params": {}}, batch, None)
    expected = {"ipo": 1.0, "odds_ratio": 0.5 * math.log(2)}.get(name, math.log(2))
    assert float(loss.sum) == pytest.approx(3 * expected, rel=1e-6)


def test_pair_sums_take_the_documents_of_each_pair_apart():
    values = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]], np.float32)
    segments = np.array([[1, 1, 2, 2, 2, 3, 3, 4, 4, 0, 0, 0]], np.int32)
    first, second = pair_sums(values, segments)
    np.testing.assert_array_equal(first, [[3, 13, 0]])
    np.testing.assert_array_equal(second, [[12, 17, 0]])


def test_what_an_answer_has_beyond_the_other_counts_less():
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 0]], np.int32)
    weights = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0]], np.float32)
    shares = np.asarray(shared_weights(weights, segments, 0.25))
    np.testing.assert_array_equal(shares * weights, [[0, 1, 1, 0, 1, 1, 0.25, 0, 1, 0, 1, 0.25, 0]])
