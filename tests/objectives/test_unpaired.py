"""KTO against its formula in float64 on torch's model: values, gradients, metrics, and what a whole step shares."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, torch_llama

from ftjax import config as configs
from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import TOTALS
from ftjax.objectives.reference import frozen_with_reference
from ftjax.objectives.unpaired import estimates_kl, imbalance, make_unpaired, make_unpaired_totals

BETA, WEIGHTS = 0.3, {"desirable_weight": 1.4, "undesirable_weight": 0.8}
MODEL = Decoder(spec())
ANSWERS = documents(0, [9, 12, 7, 10, 8])
GOOD = [True, False, True, True, False]
OTHERS = documents(1, [8, 11, 9, 7])  # mismatched documents; their number need not be the same
POLICY, REFERENCE = 1, 0  # seeds of parameters: the mean log ratio of OTHERS is positive, and the other way negative


def settings(**changes):
    config = configs.defaults()
    config.objective.update({"name": "kto", "beta": BETA} | WEIGHTS | changes)
    return config.objective


def batch_in(answers, others, length=44):
    """Rows of answers, given by their numbers, and of mismatched documents."""
    batch = batch_of([[ANSWERS[i] for i in row] for row in answers], length)
    batch["labels"] = np.zeros(batch["tokens"].shape, np.float32)
    for b, row in enumerate(answers):
        label = np.repeat([1.0 if GOOD[i] else -1.0 for i in row], [len(ANSWERS[i][0]) for i in row])
        batch["labels"][b, : len(label)] = label
    mismatched = batch_of([[OTHERS[i] for i in row] for row in others], length)
    return batch | {f"mismatched_{name}": array for name, array in mismatched.items()}


# Documents in rows, and micro-batches: one side is missing in some, and mismatched documents in others.
LAYOUTS = {
    "packed": [batch_in([[0, 1, 2], [3, 4]], [[0, 1], [2, 3]])],
    "alone": [batch_in([[3], []], [[1], [3]]), batch_in([[0], [4]], [[], []]), batch_in([[2], [1]], [[0], [2]])],
    "three micro-batches": [
        batch_in([[0, 2], []], [[], []]),
        batch_in([[1], [3]], [[3, 0], [1]]),
        batch_in([[], [4]], [[], [2]]),
    ],
}


@functools.cache
def compiled(**changes):
    config = settings(**changes)
    objective, totals = make_unpaired(MODEL, config), make_unpaired_totals(MODEL, config)

    def loss_sum(params, frozen, sums, batch):
        loss = objective({"params": params, TOTALS: sums} | frozen, batch, None)
        return loss.sum, loss

    whole = jax.jit(lambda params, frozen, batch: totals({"params": params} | frozen, batch))
    return jax.jit(jax.value_and_grad(loss_sum, has_aux=True)), whole


def step_of(micro_batches, policy=POLICY, reference=REFERENCE, **changes):
    """(the summed Loss, the gradients of its sum) of micro-batches, which know the whole step's totals."""
    objective, totals = compiled(**changes)
    params, frozen = numpy_params(MODEL, policy), frozen_with_reference({}, {"params": numpy_params(MODEL, reference)})
    add = functools.partial(jax.tree.map, lambda *leaves: sum(leaves))
    sums = add(*(totals(params, frozen, batch) for batch in micro_batches))
    parts = [objective(params, frozen, sums, batch) for batch in micro_batches]
    return jax.device_get(add(*(loss for (_, loss), _ in parts))), jax.device_get(add(*(found for _, found in parts)))


def torch_logp(model, document):
    """log p of the trained tokens of a document, in float64."""
    tokens, trained = document
    ids = torch.tensor(tokens, dtype=torch.long)
    logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
    return logps.gather(-1, ids[1:, None])[:, 0][torch.tensor(trained[1:])].sum()


@functools.cache
def witness(policy, reference, loss):
    """(mean loss, gradients of it, metrics) by the paper's equation 7, in float64."""
    ours, theirs = (torch_llama(CONFIG, numpy_params(MODEL, seed)).double() for seed in (policy, reference))
    ratio = lambda document: torch_logp(ours, document) - torch_logp(theirs, document).detach()  # noqa: E731
    with torch.no_grad():
        mean = torch.stack([ratio(document) for document in OTHERS]).mean()
    kl = mean.clamp(min=0) if loss == "kto" else 0.0
    ratios = torch.stack([ratio(document) for document in ANSWERS])
    logps = torch.stack([torch_logp(ours, document) for document in ANSWERS])
    good, value = torch.tensor(GOOD), torch.sigmoid
    losses = torch.where(
        good,
        WEIGHTS["desirable_weight"] * (1 - value(BETA * (ratios - kl))),
        WEIGHTS["undesirable_weight"] * (1 - value(BETA * (kl - ratios))),
    )
    losses.mean().backward()
    metrics = {"logps/chosen": logps[good], "logps/rejected": logps[~good]}
    metrics |= {"rewards/chosen": BETA * ratios[good], "rewards/rejected": BETA * ratios[~good]}
    metrics = {name: values.mean().item() for name, values in metrics.items()}
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if loss == "kto":
        metrics["kl"] = float(kl)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    return losses.mean().item(), gradients, metrics, float(mean)


def check(loss, gradients, expected):
    value, theirs, metrics, _ = expected
    assert float(loss.weight) == len(ANSWERS)
    np.testing.assert_allclose(loss.sum / loss.weight, value, rtol=1e-5)
    assert loss.metrics.keys() == metrics.keys()
    for name, (total, weight) in loss.metrics.items():
        np.testing.assert_allclose(total / weight, metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    flat, theirs = tree.flatten(gradients), from_torch(theirs, numpy_params(MODEL, 0))
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    worst = max(np.abs(flat[path] / len(ANSWERS) - theirs[path]).max() for path in theirs) / largest
    assert largest > 1e-2
    assert worst < 1e-5
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_metrics_are_the_formulas_however_a_step_is_split(layout, record_figure):
    expected = witness(POLICY, REFERENCE, "kto")
    assert expected[3] > 0.1
    record_figure(f"gradients, {layout}", check(*step_of(LAYOUTS[layout]), expected))


def test_a_negative_estimate_counts_as_0():
    expected = witness(REFERENCE, POLICY, "kto")
    assert expected[3] < -0.1
    check(*step_of(LAYOUTS["packed"], REFERENCE, POLICY), expected)


@pytest.mark.slow
def test_apo_zero_has_no_reference_point_and_needs_no_mismatched_documents():
    plain = {name: array for name, array in LAYOUTS["packed"][0].items() if not name.startswith("mismatched")}
    check(*step_of([plain], loss=("apo_zero_unpaired",)), witness(POLICY, REFERENCE, "apo_zero_unpaired"))


def test_only_losses_with_a_reference_point_need_mismatched_documents():
    assert not estimates_kl(settings(loss=("apo_zero_unpaired",)))
    assert estimates_kl(settings())
    assert estimates_kl(settings(loss=(("kto", 0.5), "apo_zero_unpaired")))


def test_a_policy_that_is_its_reference_has_loss_one_half_of_each_weight_and_kl_0():
    loss, gradients = step_of(LAYOUTS["three micro-batches"], POLICY, POLICY)
    assert float(loss.sum) == pytest.approx(0.5 * (3 * 1.4 + 2 * 0.8), rel=1e-6)
    assert float(loss.metrics["kl"][0]) == float(loss.metrics["rewards/margins"][0]) == 0
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_a_side_that_a_step_has_not_has_no_part_in_its_metrics():
    loss, _ = step_of([batch_in([[0, 2], [3]], [[1], [2]])])
    weights = {name: float(weight) for name, (_, weight) in loss.metrics.items()}
    none = {name for name, weight in weights.items() if weight == 0}
    assert none == {"rewards/rejected", "logps/rejected", "rewards/margins"}
    assert {weights[name] for name in ("rewards/chosen", "logps/chosen", "kl")} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": ("sigmoid",)}, "'sigmoid' is no loss; known: apo_zero_unpaired, kto"),
        ({"loss": ("kto", ("kto", 0.5))}, "a loss stands there twice"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0, so that nothing is learned"),
    ],
)
def test_losses_of_pairs_and_of_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_unpaired(MODEL, settings(**changes))


def test_sides_of_different_size_are_weighed_as_the_paper_recommends():
    even = settings(desirable_weight=1.0, undesirable_weight=1.0)
    for good, bad in ((100, 100), (130, 100), (133, 100)):
        assert imbalance(even, good, bad) == ""
    for good, bad in ((400, 100), (100, 250), (99, 1000)):
        found = imbalance(even, good, bad)
        key, value = re.search(r"--config.objective.(\w+)=([\d.]+) makes it so", found).groups()
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, key: float(value)}
        assert imbalance(settings(**weights), good, bad) == ""
        assert float(value) > 1
    assert "400 answers are called good and 100 bad, which count as 4 : 1" in imbalance(even, 400, 100)
    assert "all answers are called good" in imbalance(even, 10, 0)
    assert imbalance(settings(undesirable_weight=0.0), 400, 100) == ""
