"""Losses, metrics and gradients of pairs against TRL's own trainer code, on the same small torch model and pairs."""

import collections
import types
import warnings

import jax
import numpy as np
import pytest
import torch
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, torch_llama

from ftjax import config as configs
from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.objectives.pair_losses import LOSSES
from ftjax.objectives.preference import make_preference
from ftjax.objectives.reference import frozen_with_reference

pytestmark = pytest.mark.slow  # TRL takes seconds to import

MODEL = Decoder(spec())
PAIRS = [documents(seed, [9 + seed, 6 + 2 * seed]) for seed in range(4)]  # (chosen, rejected) each
OF_TRL = [name for name in LOSSES if name not in ("simpo", "odds_ratio")]
METRICS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
METRICS += ["logps/chosen", "logps/rejected"]


class Scored(torch.nn.Module):
    """What TRL's trainer asks a model with a fused head for: statistics by token, of those with a label."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, **_):
        logps = torch.log_softmax(self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1], -1)
        labels, there = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        by_token = lambda values: torch.where(there, values, 0)  # noqa: E731
        return types.SimpleNamespace(
            log_probs=by_token(logps.gather(-1, labels[..., None])[..., 0]),
            entropy=by_token(-(logps.exp() * logps).sum(-1)),
            mean_logits=by_token(logps.mean(-1)),
            is_top1=(logps.argmax(-1) == labels) & there,
            log_sum_sq_probs=by_token(torch.logsumexp(2 * logps, -1)),
        )


def inputs_of_trl():
    """Chosen answers, then rejected ones, padded on the right, as its collator lays them out."""
    every = [pair[side] for side in (0, 1) for pair in PAIRS]
    width = max(len(tokens) for tokens, _ in every)
    ids, there, answers = (torch.zeros(len(every), width, dtype=torch.long) for _ in range(3))
    for i, (tokens, trained) in enumerate(every):
        ids[i, : len(tokens)], there[i, : len(tokens)] = torch.tensor(tokens), 1
        answers[i, : len(tokens)] = torch.tensor(trained)
    return {"input_ids": ids, "attention_mask": there, "completion_mask": answers}


def by_trl(config, names):
    """(loss, metrics, gradients by parameter)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import dpo_trainer
    policy, reference = (Scored(torch_llama(CONFIG, numpy_params(MODEL, seed))) for seed in (0, 1))
    trainer = types.SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
        ),
        args=types.SimpleNamespace(
            gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=config.discopop_tau
        ),
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=config.weighting == "wpo", _tp_size=1,
        _total_train_tokens=0,
        ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
        f_divergence_type=config.divergence, f_alpha_divergence_coef=config.divergence_alpha,
        loss_types=list(names), loss_weights=list(names.values()), beta=config.beta,
        label_smoothing=config.label_smoothing, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, policy.train(), inputs_of_trl(), False)
    loss.backward()
    gradients = {
        name.removeprefix(
            "model.",
        ): leaf.grad
        for name, leaf in policy.named_parameters()
    }
    return loss.item(), {name: trainer._metrics["train"][name][0] for name in METRICS}, gradients


def settings(names, **changes):
    config = configs.defaults().objective
    config.update({"name": "dpo", "beta": 0.3, "loss": tuple(names.items())} | changes)
    return config


CASES = {name: ({name: 1.0}, {"label_smoothing": 0.1} if name == "exo_pair" else {}) for name in OF_TRL}
CASES |= {
    "robust, smoothed": ({"robust": 1.0}, {"label_smoothing": 0.1}),
    "aot, smoothed": ({"aot": 1.0}, {"label_smoothing": 0.1}),
    "mixed": ({"sigmoid": 0.8, "bco_pair": 0.3, "sft": 0.5}, {}),
    "LD-DPO": ({"sigmoid": 1.0}, {"ld_alpha": 0.3}),
    "WPO": ({"sigmoid": 1.0}, {"weighting": "wpo"}),
    "WPO, mixed": ({"bco_pair": 0.5, "ipo": 1.0}, {"weighting": "wpo", "ld_alpha": 0.5}),
    "forward KL": ({"sigmoid": 1.0}, {"divergence": "forward_kl"}),
    "JS": ({"ipo": 1.0}, {"divergence": "js_divergence"}),
    "alpha": ({"hinge": 1.0}, {"divergence": "alpha_divergence", "divergence_alpha": 0.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_trls(case, record_figure):
    names, changes = CASES[case]
    config = settings(names, **changes)
    expected, metrics, gradients = by_trl(config, names)
    params = numpy_params(MODEL, 0)
    objective = make_preference(MODEL, config, ())
    batch = batch_of([[*PAIRS[0], *PAIRS[1]], [*PAIRS[2]], [*PAIRS[3]]], 44)
    frozen = frozen_with_reference({}, {"params": numpy_params(MODEL, 1)})

    def mean(params, frozen, batch):
        loss = objective({"params": params} | frozen, batch, None)
        return loss.sum / loss.weight, loss

    (ours, loss), found = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, frozen, batch)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for name in METRICS:
        total, weight = loss.metrics[name]
        np.testing.assert_allclose(total / weight, metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    theirs, flat = from_torch(gradients, params), tree.flatten(found)
    largest = max(np.abs(theirs[path]).max() for path in theirs)
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs) / largest
    assert worst < 1e-5
    record_figure("loss, relative", abs(float(ours) / expected - 1))
    record_figure("gradients, of the largest", worst)
