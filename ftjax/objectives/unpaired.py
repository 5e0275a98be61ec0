"""Learning from answers that are called good or bad, each by itself: KTO, with the names of TRL's trainer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import Batch, document_sums, token_logps
from ftjax.objectives.loss import TOTALS, Loss, Objective
from ftjax.objectives.preference import mixture
from ftjax.objectives.reference import policy_and_moving_reference
from ftjax.objectives.scores import is_last
from ftjax.tree import Tree

KTO, APO_ZERO = "kto", "apo_zero_unpaired"


def make_unpaired(model: Decoder, config: ConfigDict) -> Objective:
    """The objective over batches of labeled documents, packed or not.

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7: 1 - sigmoid(beta (h - z)) of a good answer and
    1 - sigmoid(beta (z - h)) of a bad one, times the weight of its side, where h = log p / p_reference of the answer
    and z is `kl_of`. apo_zero_unpaired has z = 0 (D'Oosterlinck et al. 2024, equation 7, of answers that are not
    paired). The loss is a sum over documents whose weight is their number.

    Raises:
      UserError: an unknown loss, or no answer would count.
    """
    if not config.desirable_weight and not config.undesirable_weight:
        raise UserError(
            "config.objective.desirable_weight and undesirable_weight are both 0, so that nothing is learned; "
            "set one of them above it"
        )
    weights, unembed, totals_of = _weights(config), make_unembed(model), make_unpaired_totals(model, config)

    def unpaired(variables, batch, rng):
        totals = variables.get(TOTALS) or totals_of(variables, batch)
        policy, frozen = policy_and_moving_reference({k: v for k, v in variables.items() if k != TOTALS})
        logps = token_logps(model, unembed, policy, batch, rng)
        # Never dropout here: the reference is what the model says, not a noisy version of it.
        theirs = jax.lax.stop_gradient(token_logps(model, unembed, frozen, batch, None))
        ratios = document_sums(logps - theirs, batch["segment_ids"])
        logps = document_sums(logps, batch["segment_ids"])
        rewards = config.beta * ratios
        good, bad = _sides(batch)
        goods, bads = good.sum(), bad.sum()
        count = goods + bads

        kl = kl_of(totals) if KTO in weights else jnp.zeros(())
        points = {KTO: config.beta * kl, APO_ZERO: 0.0}
        importance = config.desirable_weight * good + config.undesirable_weight * bad
        loss = jnp.zeros(())
        for name, weight in weights.items():
            loss += weight * jnp.sum(importance * jax.nn.sigmoid((bad - good) * (rewards - points[name])))

        # The difference of two means over the whole step, each over its own side; without one of them there is none.
        of_side = good / jnp.maximum(totals["good"], 1) - bad / jnp.maximum(totals["bad"], 1)
        margin = (totals["good"] + totals["bad"]) * jnp.sum(rewards * of_side)
        both = (totals["good"] > 0) & (totals["bad"] > 0)
        metrics = {
            "rewards/chosen": (jnp.sum(rewards * good), goods),
            "rewards/rejected": (jnp.sum(rewards * bad), bads),
            "rewards/margins": (jnp.where(both, margin, 0), jnp.where(both, count, 0)),
            "logps/chosen": (jnp.sum(logps * good), goods),
            "logps/rejected": (jnp.sum(logps * bad), bads),
        }
        return Loss(loss, count, metrics | ({"kl": (kl * count, count)} if KTO in weights else {}))

    return unpaired


def make_unpaired_totals(model: Decoder, config: ConfigDict) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """(variables, batch) -> what the objective needs to know of the whole step, or evaluation, as sums.

    The numbers of good and of bad documents, and where the loss has a reference point the log ratios of the mismatched
    documents with their number.
    """
    unembed, estimates = make_unembed(model), estimates_kl(config)

    def totals(variables: Tree, batch: Batch) -> dict[str, jax.Array]:
        good, bad = _sides(batch)
        counts = {"good": good.sum(), "bad": bad.sum()}
        if not estimates:
            return counts
        prefix = "mismatched_"
        others = {name.removeprefix(prefix): leaf for name, leaf in batch.items() if name.startswith(prefix)}
        ours, theirs = (
            token_logps(model, unembed, its, others, None) for its in policy_and_moving_reference(variables)
        )
        there = document_sums(others["weights"], others["segment_ids"]) > 0
        return counts | {"ratios": jnp.sum(ours - theirs), "mismatched": there.astype(jnp.float32).sum()}

    return totals


def kl_of(totals: dict[str, jax.Array]) -> jax.Array:
    """The reference point, without gradient: the mean log ratio of mismatched documents, or 0 where that is negative.

    Ethayarajh et al. 2024, section 4.1: an estimate of KL(policy || reference), biased by its mismatched completions.
    """
    mean = totals["ratios"] / jnp.maximum(totals["mismatched"], 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def estimates_kl(config: ConfigDict) -> bool:
    """Whether the loss has a reference point, for which batches need mismatched documents."""
    return KTO in _weights(config)


def imbalance(config: ConfigDict, good: float, bad: float) -> str:
    """What to change where so many good and bad answers do not count as equation 8 recommends; "" where they do.

    That is desirable_weight good : undesirable_weight bad from 1 : 1 to 4 : 3.
    """
    if not good or not bad:
        return f"all answers are called {'good' if good else 'bad'}; kto learns from the difference, so add others"
    ours, theirs = config.desirable_weight * good, config.undesirable_weight * bad
    if not ours or not theirs:  # a side is left out on purpose
        return ""
    ratio = ours / theirs
    if 0.99 <= ratio <= 1.34:  # rounded, as people do
        return ""
    key, factor = ("desirable_weight", 7 / 6 / ratio) if ratio < 1 else ("undesirable_weight", ratio / (7 / 6))
    return (
        f"{good:,.0f} answers are called good and {bad:,.0f} bad, which count as {ratio:.2g} : 1 by "
        "config.objective.desirable_weight and undesirable_weight; between 1 : 1 and 4 : 3 is recommended (Ethayarajh "
        f"et al. 2024): --config.objective.{key}={config[key] * factor:.2g} makes it so"
    )


def _weights(config: ConfigDict) -> dict[str, float]:
    return dict(mixture(config, ((KTO, 1.0),), (KTO, APO_ZERO)))


def _sides(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """float32 [B, T // 2] each: 1 at documents that are called good, and bad."""
    segments = batch["segment_ids"]
    scored = document_sums((batch["weights"] != 0).astype(jnp.float32), segments) > 0
    label = document_sums(jnp.where(is_last(segments), batch["labels"], 0), segments)
    return tuple((scored & (sign * label > 0)).astype(jnp.float32) for sign in (1, -1))
