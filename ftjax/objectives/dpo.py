"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7), sigmoid loss."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import pair_sums, token_logps
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.reference import policy_and_reference


def make_dpo(model: Decoder, config: ConfigDict) -> Objective:
    """The objective over batches of pairs, packed or not; config: `beta`, how strongly the reference holds.

    The loss of a pair is -log sigmoid(beta (h(chosen) - h(rejected))) with h = log p / p_reference of a whole answer.
    It is a sum over pairs, and its weight the number of pairs. Metrics have TRL's names: rewards are beta h.
    """
    unembed = make_unembed(model)

    def dpo(variables, batch, rng):
        policy, reference = policy_and_reference(variables)
        segments = batch["segment_ids"]
        logps = pair_sums(token_logps(model, unembed, policy, batch, rng), segments)
        # Never dropout here: the reference is what the model says, not a noisy version of it.
        reference_logps = pair_sums(token_logps(model, unembed, reference, batch, None), segments)
        there = (pair_sums(batch["weights"], segments)[0] > 0).astype(jnp.float32)  # [B, P]: is a pair in this slot?
        chosen, rejected = (
            config.beta * (ours - jax.lax.stop_gradient(theirs)) for ours, theirs in zip(logps, reference_logps)
        )
        margins, pairs = chosen - rejected, there.sum()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        loss = jnp.sum(-jax.nn.log_sigmoid(margins) * there)
        return Loss(loss, pairs, {name: (jnp.sum(values * there), pairs) for name, values in metrics.items()})

    return dpo
