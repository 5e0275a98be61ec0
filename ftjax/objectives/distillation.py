"""Learning from another model's probabilities: generalized knowledge distillation (Agarwal et al. 2023)."""

import jax
from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.divergence import Between, divergence_per_token
from ftjax.objectives.head import at_temperature, head_of, make_unembed, within
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.reference import TEACHER, policy_and_reference


def make_distillation(model: Decoder, config: ConfigDict, teacher: Decoder | None = None) -> Objective:
    """The objective over batches of the arrays of `packing.BATCH`, all [B, T], whoever wrote the trained tokens.

    The loss is a mean over trained tokens of the generalized Jensen-Shannon divergence between the teacher and the
    policy over the whole vocabulary, with `config.distill_beta` (see `divergence_per_token`), both at
    `config.distill_temperature`: arXiv 2306.13649, equation 1, as TRL's `generalized_jsd_loss`. `entropy` is the
    policy's at that temperature. No gradient goes through what was sampled (section 3.2).

    teacher: has the same vocabulary, its variables in the collection TEACHER. Where one of the two has more logits,
    which are padding, probabilities are those over what both have. None: the objective is only described, such as for
    reading a run.
    """
    common = min(model.spec.vocab_size, (teacher or model).spec.vocab_size)
    unembed = at_temperature(config.distill_temperature, make_unembed(model))
    their_unembed = at_temperature(config.distill_temperature, make_unembed(teacher or model))
    how = Between(unembed, their_unembed, config.distill_beta)

    def distillation(variables, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        given = batch["tokens"], batch["positions"], batch["segment_ids"]
        policy, _ = policy_and_reference(variables)
        hidden, _ = model.apply(policy, *given, rngs=rngs)
        # Never dropout in the teacher: it is what that model says, not a noisy version of it.
        theirs = jax.lax.stop_gradient(variables[TEACHER])
        their_hidden, _ = teacher.apply(theirs, *given)
        their_head, their_hidden = within(head_of(teacher, theirs), common), jax.lax.stop_gradient(their_hidden)
        heads = within(head_of(model, policy), common), hidden, their_head, their_hidden
        weights = batch["weights"]
        divergence, entropy = divergence_per_token(how, None, *heads, weights != 0, rng)
        weight = weights.sum()
        return Loss((divergence * weights).sum(), weight, {"entropy": ((entropy * weights).sum(), weight)})

    return distillation
