"""Supervised fine-tuning: cross-entropy of the trained tokens, and KL to the model before training on replayed ones."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives import balance
from ftjax.objectives.cross_entropy import PLAIN, Further, cross_entropy
from ftjax.objectives.divergence import kl_per_token
from ftjax.objectives.head import head_of, make_unembed
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.reference import policy_and_reference


def make_sft(model: Decoder, config: ConfigDict | None = None) -> Objective:
    """The objective over batches of the arrays of `packing.BATCH`, all [B, T].

    config: `label_smoothing` and `z_loss` (see `Further`), `kl_coef`, and of mixtures `router_balance`,
    `router_z_loss` and `router_bias_rate` (balance.py); None is without. With any of them but the last there is one
    more metric, the cross-entropy alone; of a mixture there are those of `balance.measures`. Its `router_balance` and
    `router_z_loss` are those of a micro-batch, over all devices.

    With `kl_coef` a trained token of a document that is replayed (`packing.REPLAY`) counts kl_coef KL(reference ||
    policy) instead of its cross-entropy, and as much as any other in the weight. So the sum does not depend on how a
    batch is split, and a step has as much of it as it has of replayed tokens.
    """
    unembed = make_unembed(model)
    further = Further(config.label_smoothing, config.z_loss) if config is not None else PLAIN
    kl_coef = config.kl_coef if config is not None else 0.0
    evens_out = config is not None and bool(config.router_balance or config.router_z_loss)

    def with_routers(loss, notes, policy, is_training):
        """`loss` with what it has of routers, where there are any."""
        if notes is None:
            return loss
        found = balance.measures(notes)
        metrics = {f"router_{name}": (value * loss.weight, loss.weight) for name, value in found.items()}
        added = loss.sum
        if evens_out:
            terms = config.router_balance * found["balance"] + config.router_z_loss * found["z"]
            added += loss.weight * terms
        if config.router_bias_rate and is_training:
            added += balance.overload(notes, policy["params"])
        return loss.replace(sum=added, metrics=loss.metrics | metrics)

    def sft(variables, batch, rng):
        policy, reference = policy_and_reference(variables)
        hidden, notes = balance.hidden_and_notes(model, policy, batch, rng, config is not None)
        head = head_of(model, policy)
        # In an evaluation there is no replay.
        is_replay = batch["replay"] > 0 if kl_coef and "replay" in batch else jnp.zeros_like(batch["weights"], bool)
        weights = jnp.where(is_replay, 0, batch["weights"])
        totals = cross_entropy(unembed, head, hidden, batch["targets"], weights, rng, further=further)
        weight = weights.sum()
        metrics = {"mean_token_accuracy": (totals["correct"], weight), "entropy": (totals["entropy"], weight)}
        if further != PLAIN or kl_coef or evens_out:
            metrics["cross_entropy"] = (totals["nll"], weight)
        if not kl_coef or "replay" not in batch:
            return with_routers(Loss(totals["loss"], weight, metrics), notes, policy, rng is not None)
        replayed = jnp.where(is_replay, batch["weights"], 0)
        # Never dropout in the reference: it is what the model says, not a noisy version of it.
        before, _ = balance.hidden_and_notes(model, reference, batch, None, False)
        theirs = jax.lax.stop_gradient((head_of(model, reference), before))
        kl = (kl_per_token(unembed, None, head, hidden, *theirs, replayed != 0, rng) * replayed).sum()
        metrics["kl"] = (kl, replayed.sum())
        loss = Loss(totals["loss"] + kl_coef * kl, weight + replayed.sum(), metrics)
        return with_routers(loss, notes, policy, rng is not None)

    return sft
