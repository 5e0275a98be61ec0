"""Losses, metrics and gradients of sampled completions against TRL's own GRPO and RLOO, on one small torch model."""

import collections
import contextlib
import functools
import types
import warnings

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from support.tiny import CONFIG, batch_of, documents, numpy_params, spec
from support.witness import from_torch, torch_llama

from ftjax import config as configs
from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.objectives.policy import LOSSES, make_policy, make_rloo
from ftjax.objectives.reference import frozen_with_reference

pytestmark = pytest.mark.slow  # TRL takes seconds to import

MODEL = Decoder(spec())
COMPLETIONS = documents(2, [9, 12, 7, 14, 10])
ADVANTAGES = [1.2, -0.8, 0.0, -1.5, 0.6]
TEMPERATURE, LONGEST = 0.7, 16
NEAR = 0.1  # ratios of whole completions are products, which are soon far from 1


class Scored(torch.nn.Module):
    """What TRL's trainer asks a model with a fused head for: log p and entropy at the temperature of sampling."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, **_):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        logps = torch.log_softmax(logits / TEMPERATURE, -1)
        labels, there = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        return types.SimpleNamespace(
            log_probs=torch.where(there, logps.gather(-1, labels[..., None])[..., 0], 0),
            entropy=torch.where(there, -(logps.exp() * logps).sum(-1), 0),
        )


def inputs_of_trl():
    """Prompts padded on the left and completions on the right, as its trainer lays them out."""
    prompts = [tokens[~trained] for tokens, trained in COMPLETIONS]
    answers = [tokens[trained] for tokens, trained in COMPLETIONS]

    def padded(parts, left):
        width = max(map(len, parts))
        ids, mask = (torch.zeros(len(parts), width, dtype=torch.long) for _ in range(2))
        for i, part in enumerate(parts):
            where = slice(width - len(part), None) if left else slice(len(part))
            ids[i, where], mask[i, where] = torch.tensor(part, dtype=torch.long), 1
        return ids, mask

    prompt_ids, prompt_mask = padded(prompts, True)
    completion_ids, completion_mask = padded(answers, False)
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "num_items_in_batch": completion_mask.sum(),
        "advantages": torch.tensor(ADVANTAGES),
    }  # fmt: skip


@functools.cache
def sampled(apart=1.0):
    """log p of each completion's tokens when they were drawn: by another policy, so that ratios of both kinds clip."""
    model, rng = Scored(torch_llama(CONFIG, numpy_params(MODEL, 0))), np.random.default_rng(4)
    out = []
    for (tokens, trained), less in zip(COMPLETIONS, (0.4, -0.3, 0.2, 0.5, -0.1), strict=True):
        ids = torch.tensor(tokens[None], dtype=torch.long)
        with torch.no_grad():
            logps = model(ids, torch.ones_like(ids), ids).log_probs[0].numpy()[trained[1:]]
        out.append((logps - apart * (less + 0.3 * rng.standard_normal(len(logps)))).astype(np.float32))
    return out


def by_trl(name, config, counts=None):
    """(loss, metrics, gradients by parameter); counts: what corrects for the engine, [completions, T or 1]"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import grpo_trainer
    policy, reference = (Scored(torch_llama(CONFIG, numpy_params(MODEL, seed))) for seed in (0, 1))
    accelerator = types.SimpleNamespace(
        num_processes=1, is_main_process=True, autocast=contextlib.nullcontext,
        reduce=lambda x, reduction: x, gather=lambda x: x,
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        model=policy.train(), accelerator=accelerator, loss_type=name, beta=config.kl_coef,
        epsilon_low=config.epsilon, epsilon_high=config.epsilon_high or config.epsilon,
        importance_sampling_level=config.importance, max_completion_length=LONGEST,
        args=types.SimpleNamespace(
            sapo_temperature_pos=config.sapo_temperature_pos, sapo_temperature_neg=config.sapo_temperature_neg,
            delta=None, use_bias_correction_kl=False, steps_per_generation=1,
        ),
        current_gradient_accumulation_steps=1, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=counts is not None, _entropy_bonus_enabled=False,
        vllm_importance_sampling_correction=True,
        _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    score = functools.partial(grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies, trainer)
    trainer._get_per_token_logps_and_entropies = score
    inputs = inputs_of_trl()
    mask = inputs["completion_mask"]
    inputs["old_per_token_logps"] = torch.zeros(mask.shape).masked_scatter(
        mask.bool(), torch.tensor(np.concatenate(sampled()))
    )
    if counts is not None:
        inputs["importance_sampling_ratio"] = torch.tensor(counts)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        there = torch.cat([inputs["prompt_mask"], mask], 1)
        inputs["ref_per_token_logps"] = score(reference, ids, there, mask.shape[1])[0]
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, policy, inputs)
    loss.backward()
    gradients = {name.removeprefix("model."): leaf.grad for name, leaf in policy.named_parameters()}
    return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items()}, gradients


def by_trl_rloo(config):
    """The same of RLOO."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.rloo_trainer import RLOOTrainer
    policy = Scored(torch_llama(CONFIG, numpy_params(MODEL, 0)))
    accelerator = types.SimpleNamespace(
        is_main_process=True, autocast=contextlib.nullcontext, reduce=lambda x, reduction: x, gather=lambda x: x
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        model=policy.train(), accelerator=accelerator, aux_loss_enabled=False, epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = functools.partial(
        RLOOTrainer._get_per_token_logps_and_entropies, trainer
    )
    old_logps = torch.tensor([logps.sum() for logps in sampled(NEAR)])
    loss = RLOOTrainer._compute_loss(trainer, policy, inputs_of_trl() | {"old_logps": old_logps})
    loss.backward()
    gradients = {name.removeprefix("model."): leaf.grad for name, leaf in policy.named_parameters()}
    return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items()}, gradients


def our_batch(apart=1.0):
    """The same completions in two rows."""
    rows = [[0, 1, 2], [3, 4]]
    batch = batch_of([[COMPLETIONS[i] for i in row] for row in rows], 32)
    by_row = [np.concatenate([sampled(apart)[i] for i in row]) for row in rows]
    batch["sampled_logps"], batch["advantages"] = (np.zeros(batch["weights"].shape, np.float32) for _ in range(2))
    batch["sampled_logps"][batch["weights"] != 0] = np.concatenate(by_row)
    by_completion = np.float32([0.0, *ADVANTAGES])
    offset = np.array([[0], [3]])  # of the second row's segments
    number = np.where(batch["segment_ids"] > 0, batch["segment_ids"] + offset, 0)
    batch["advantages"] = np.where(batch["weights"] != 0, by_completion[number], 0)
    return batch


CHANGES = {
    "cispo": {"epsilon_high": 1.1},
    "dapo": {"epsilon_high": 0.28},
    "sapo": {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.4},
}


# Of the rest of all combinations test_policy.py has the formulas.
CASES = [(name, *kind) for name in LOSSES for kind in (("token", 0.0), ("sequence", 0.04))]


@pytest.mark.parametrize(
    ("name", "importance", "kl_coef"), [*CASES, ("grpo", "sequence", 0.0), ("dapo", "token", 0.04)]
)
def test_loss_metrics_and_gradients_are_trls(name, importance, kl_coef, record_figure):
    config = ConfigDict(
        configs.defaults().objective.to_dict() | {"loss": (name,), "importance": importance, "kl_coef": kl_coef}
    )
    config.update(CHANGES.get(name, {}))
    objective = make_policy(MODEL, config, temperature=TEMPERATURE, max_new_tokens=LONGEST)
    compare(by_trl(name, config), objective, our_batch(), record_figure)


@pytest.mark.parametrize(("name", "importance"), [("dapo", "token"), ("grpo", "sequence"), ("cispo", "token")])
def test_what_drew_the_tokens_is_corrected_for_as_in_trl(name, importance, record_figure):
    given = {"loss": (name,), "importance": importance, "kl_coef": 0.04} | CHANGES.get(name, {})
    config = ConfigDict(configs.defaults().objective.to_dict() | given)
    counts = np.float32([[0.3], [1.7], [1.0], [0.0], [0.8]])
    batch = our_batch()
    where = batch["weights"] != 0
    number = np.where(batch["segment_ids"] > 0, batch["segment_ids"] + np.array([[-1], [2]]), 0)
    batch |= {"old_logps": batch["sampled_logps"], "correction": np.where(where, counts[number, 0], 0)}
    objective = make_policy(MODEL, config, temperature=TEMPERATURE, max_new_tokens=LONGEST)
    compare(by_trl(name, config, counts), objective, batch, record_figure)


def test_rloo_is_trls(record_figure):
    config = ConfigDict(configs.defaults().objective.to_dict() | {"epsilon": 0.1, "epsilon_high": 0.15})
    objective = make_rloo(MODEL, config, temperature=TEMPERATURE, max_new_tokens=LONGEST)
    compare(by_trl_rloo(config), objective, our_batch(NEAR), record_figure)


def compare(theirs, objective, batch, record_figure):
    expected, metrics, gradients = theirs
    params = numpy_params(MODEL, 0)
    frozen = frozen_with_reference({}, {"params": numpy_params(MODEL, 1)})

    def mean(params, frozen, batch):
        loss = objective({"params": params} | frozen, batch, None)
        return loss.sum / loss.weight, loss

    (ours, loss), found = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, frozen, batch)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # Its own metric of how far the engine is from the trainer needs vLLM; the ends over completions are not ours.
    there = metrics.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}
    assert loss.metrics.keys() - {"sampling/logp_difference_mean"} == there
    for metric in there:
        total, weight = loss.metrics[metric]
        np.testing.assert_allclose(total / weight, metrics[metric], rtol=1e-5, err_msg=metric)
        assert "clip" not in metric or 0 < metrics[metric] < 1
        record_figure(metric, total / weight)
    theirs, flat = from_torch(gradients, params), tree.flatten(found)
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    worst = max(np.abs(flat[path] - theirs[path]).max() for path in theirs) / largest
    assert worst < 1e-5
    record_figure("loss, relative", abs(float(ours) / expected - 1))
    record_figure("gradients, of the largest", worst)
