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
from ftjax.objectives.unpaired import make_unpaired

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


def inputs_of_trl(every=None, prefix=""):
    """Chosen answers, then rejected ones, or `every`; padded on the right, as its collators lay them out."""
    every = every or [pair[side] for side in (0, 1) for pair in PAIRS]
    width = max(len(tokens) for tokens, _ in every)
    ids, there, answers = (torch.zeros(len(every), width, dtype=torch.long) for _ in range(3))
    for i, (tokens, trained) in enumerate(every):
        ids[i, : len(tokens)], there[i, : len(tokens)] = torch.tensor(tokens), 1
        answers[i, : len(tokens)] = torch.tensor(trained)
    arrays = {"input_ids": ids, "attention_mask": there, "completion_mask": answers}
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def by_trl(config, names):
    """(loss, metrics, gradients by parameter)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import dpo_trainer
    policy, reference = (Scored(torch_llama(CONFIG, numpy_params(MODEL, seed))) for seed in (0, 1))
    trainer = trainer_of(
        config, policy, reference,
        use_weighting=config.weighting == "wpo", ld_alpha=None if config.ld_alpha == 1 else config.ld_alpha,
        f_divergence_type=config.divergence, f_alpha_divergence_coef=config.divergence_alpha,
        loss_types=list(names), loss_weights=list(names.values()), label_smoothing=config.label_smoothing,
    )  # fmt: skip
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, policy.train(), inputs_of_trl(), False)
    return outcome_of(loss, trainer, policy, METRICS)


def trainer_of(config, policy, reference, **more):
    """What the losses of TRL's trainers read of these."""
    return types.SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=types.SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
        ),
        args=types.SimpleNamespace(
            gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=config.discopop_tau
        ),
        aux_loss_enabled=False, precompute_ref_logps=False, _tp_size=1, _total_train_tokens=0, beta=config.beta,
        _metrics={"train": collections.defaultdict(list)}, **more,
    )  # fmt: skip


def outcome_of(loss, trainer, policy, names):
    loss.backward()
    gradients = {name.removeprefix("model."): leaf.grad for name, leaf in policy.named_parameters()}
    return loss.item(), {name: trainer._metrics["train"][name][0] for name in names}, gradients


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
    batch = batch_of([[*PAIRS[0], *PAIRS[1]], [*PAIRS[2]], [*PAIRS[3]]], 44)
    check(make_preference(MODEL, config, ()), batch, by_trl(config, names), record_figure)


def check(objective, batch, theirs, record_figure):
    """Loss, metrics and gradients of an objective over a batch against (loss, metrics, gradients by parameter)."""
    expected, metrics, gradients = theirs
    params = numpy_params(MODEL, 0)
    frozen = frozen_with_reference({}, {"params": numpy_params(MODEL, 1)})

    def mean(params, frozen, batch):
        loss = objective({"params": params} | frozen, batch, None)
        return loss.sum / loss.weight, loss

    (ours, loss), found = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, frozen, batch)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    for name in metrics:
        total, weight = loss.metrics[name]
        np.testing.assert_allclose(total / weight, metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    theirs, flat = from_torch(gradients, params), tree.flatten(found)
    largest = max(np.abs(theirs[path]).max() for path in theirs)
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs) / largest
    assert worst < 1e-5
    record_figure("loss, relative", abs(float(ours) / expected - 1))
    record_figure("gradients, of the largest", worst)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_of_labeled_answers_are_trls(name, record_figure):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import kto_trainer
    weights = {"desirable_weight": 1.4, "undesirable_weight": 0.8}
    config, sides = settings({name: 1.0}, name="kto", **weights), [True, False, True]
    answers, others = documents(7, [9, 12, 7]), documents(11, [8, 11, 9])
    policy, reference = (Scored(torch_llama(CONFIG, numpy_params(MODEL, seed))) for seed in (0, 1))
    trainer = trainer_of(config, policy, reference, loss_type=name, calculate_KL=name == "kto", **weights)
    trainer._compute_kl_logps = types.MethodType(kto_trainer.KTOTrainer._compute_kl_logps, trainer)
    inputs = inputs_of_trl(answers) | inputs_of_trl(others, "KL_") | {"label": torch.tensor(sides)}
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, policy.train(), inputs, False)
    names = [metric for metric in METRICS if metric != "rewards/accuracies"] + ["kl"] * (name == "kto")
    theirs = outcome_of(loss, trainer, policy, names)
    if name == "kto":
        assert theirs[1]["kl"] > 0.1

    batch = batch_of([[answers[0], answers[1]], [answers[2]]], 24)
    labels = [[1.0] * 9 + [-1.0] * 12 + [0.0] * 3, [1.0] * 7 + [0.0] * 17]
    mismatched = batch_of([[others[2]], [others[0], others[1]]], 24)
    batch |= {"labels": np.array(labels, np.float32)} | {f"mismatched_{key}": leaf for key, leaf in mismatched.items()}
    check(make_unpaired(MODEL, config), batch, theirs, record_figure)
