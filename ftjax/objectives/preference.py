"""Learning from pairs of answers, one preferred: DPO and its family, with a reference or without (SimPO, ORPO, CPO)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax.errors import UserError, did_you_mean
from ftjax.models.decoder import Decoder
from ftjax.objectives.cross_entropy import Further
from ftjax.objectives.head import make_unembed
from ftjax.objectives.logps import Batch, of_tokens, pair_sums, shared_weights, token_logps
from ftjax.objectives.loss import TOTALS, Loss, Objective
from ftjax.objectives.pair_losses import LOSSES, Pairs
from ftjax.objectives.reference import policy_and_moving_reference
from ftjax.tree import Tree

WPO = "wpo"
SFT = "sft"  # in a mixture: the cross-entropy of the chosen answers, a mean over their tokens and not over pairs
Weighted = Sequence[tuple[str, float]]


def make_preference(
    model: Decoder, config: ConfigDict, usual: Weighted, reference: bool = True, sampled: bool = False
) -> Objective:
    """The objective over batches of pairs, packed or not.

    The loss is the weighted sum of `config.loss` (`usual` where that is empty), a sum over pairs whose weight is their
    number. Metrics have TRL's names: rewards are beta h, h = log p / p_reference of a whole answer, and without a
    reference beta log p.

    reference: there is one; without, only losses that have a meaning then are allowed.
    sampled: the policy wrote the answers, beside a reference that is asked here. The mean of log p / p_reference over
      both of all pairs then estimates KL(policy || reference) of an answer: `objective/kl`.

    Raises:
      UserError: an unknown loss, one that needs a reference, or a setting that none of them uses or that is out of its
        range.
    """
    weights = dict(mixture(config, usual, (*LOSSES, SFT)))
    _check(weights, config, reference)
    unembed = make_unembed(model)

    def preference(variables, batch, rng):
        segments = batch["segment_ids"]
        policy, frozen = policy_and_moving_reference({k: v for k, v in variables.items() if k != TOTALS})
        # LD-DPO (Liu et al. 2024, equation 11): what the longer answer has beyond the length of the other counts less.
        shares = shared_weights(batch["weights"], segments, config.ld_alpha) if config.ld_alpha != 1 else 1.0
        found = of_tokens(model, unembed, policy, batch, rng, Further(squares=config.weighting == WPO))
        by_token = -found.loss * batch["weights"]
        logps = pair_sums(by_token * shares, segments)
        reference_logps = (jnp.zeros_like(logps[0]),) * 2
        if config.cache_reference:
            reference_logps = pair_sums(batch["reference_logps"], segments)
        elif reference:
            # Never dropout here: the reference is what the model says, not a noisy version of it.
            theirs = jax.lax.stop_gradient(token_logps(model, unembed, frozen, batch, None))
            reference_logps = pair_sums(theirs * shares, segments)
        tokens = pair_sums((batch["weights"] != 0).astype(jnp.float32), segments)
        there = (tokens[0] > 0).astype(jnp.float32)
        pairs = Pairs(*logps, *reference_logps, *tokens, there)
        count = there.sum()
        counted = there
        if config.weighting == WPO:
            counted = there * pair_weights(by_token, found.log_squares, tokens, segments)

        loss = jnp.zeros(())
        for name, weight in weights.items():
            if name == SFT:
                totals = variables.get(TOTALS) or preference_totals(variables, batch)
                # The mean over the chosen tokens of the whole step, as the other losses are means over its pairs.
                nll = -jnp.sum(pair_sums(by_token, segments)[0] * there)
                loss += weight * nll * totals["pairs"] / jnp.maximum(totals["chosen_tokens"], 1)
            else:
                loss += weight * jnp.sum(LOSSES[name].function(pairs, config) * counted)
        chosen, rejected = (config.beta * ratio for ratio in pairs.ratios())
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        if sampled:
            metrics["objective/kl"] = sum(pair_sums(by_token - theirs, segments)) / 2
        return Loss(loss, count, {name: (jnp.sum(values * there), count) for name, values in metrics.items()})

    return preference


def pair_weights(
    logps: jax.Array, log_squares: jax.Array, tokens: tuple[jax.Array, jax.Array], segment_ids: jax.Array
) -> jax.Array:
    """float32 [B, P], without a gradient: how much a pair counts, by how likely the policy writes both its answers.

    The product of exp of the mean over an answer's tokens of log p(token) - log sum_v p(v)^2: off-policy answers count
    less, and a token drawn from the policy about 1, however sure that is. WPO (Zhou et al. 2024, arXiv 2406.11827),
    equation 2. logps and log_squares float32 [B, T], 0 where nothing is scored; tokens: those scored, [B, P] each.
    """
    sums = pair_sums(jax.lax.stop_gradient(logps - log_squares), segment_ids)
    return jnp.exp(sum(total / jnp.maximum(count, 1) for total, count in zip(sums, tokens, strict=True)))


def preference_totals(variables: Tree, batch: Batch) -> dict[str, jax.Array]:
    """What a loss needs to know of the whole step: the number of pairs and of tokens of the chosen answers."""
    chosen, _ = pair_sums((batch["weights"] != 0).astype(jnp.float32), batch["segment_ids"])
    return {"pairs": (chosen > 0).astype(jnp.float32).sum(), "chosen_tokens": chosen.sum()}


def compares_pairs(config: ConfigDict) -> str:
    """The name of a loss in `config.loss` that compares all pairs of a step with each other; "" for none."""
    names = [name for name, _ in mixture(config, (), (*LOSSES, SFT)) if name != SFT]
    return next((name for name in names if LOSSES[name].over_batch), "")


def mixture(config: ConfigDict, usual: Weighted, known: Sequence[str]) -> list[tuple[str, float]]:
    """(name, weight) of each entry of config.loss, or of `usual` where it is empty: a name, whose weight is 1, or both.

    Raises:
      UserError: a name that is not in `known`, or stands there twice.
    """
    losses = [(entry, 1.0) if isinstance(entry, str) else tuple(entry) for entry in config.loss] or list(usual)
    for name, _ in losses:
        if name not in known:
            raise UserError(f"config.objective.loss: {name!r} is no loss{did_you_mean(name, known)}")
    if len({name for name, _ in losses}) < len(losses):
        raise UserError(f"config.objective.loss={tuple(config.loss)}: a loss stands there twice; add its weights up")
    return losses


def _check(weights: dict[str, float], config: ConfigDict, reference: bool) -> None:
    names = [name for name in weights if name != SFT]
    if not names:
        raise UserError("config.objective.loss: 'sft' alone does not compare answers; use objective.name='sft'")
    if not reference and (needy := [name for name in names if LOSSES[name].reference]):
        free = ", ".join(name for name, loss in LOSSES.items() if not loss.reference)
        raise UserError(
            f"config.objective.loss: {needy[0]!r} compares with a reference, which objective.name={config.name!r} has "
            f"not; use objective.name='dpo', or one of {free}"
        )
    defaults, read = configs.defaults().objective, {key for name in names for key in LOSSES[name].settings}
    for key in ("label_smoothing", "divergence", "divergence_alpha", "discopop_tau", "gamma"):
        if key not in read and config[key] != defaults[key]:
            users = ", ".join(name for name, loss in LOSSES.items() if key in loss.settings)
            raise UserError(
                f"config.objective.{key}={config[key]!r} does nothing with the loss {', '.join(names)}; leave it at "
                f"its default, or use one of {users}"
            )
    # With another divergence, losses that are not made of its scores would go on as if it were not there.
    if config.divergence != defaults.divergence:
        if fixed := [name for name in names if "divergence" not in LOSSES[name].settings]:
            raise UserError(f"config.objective.divergence: the loss {fixed[0]!r} has none; leave it at reverse_kl")
        if not reference:
            raise UserError(f"config.objective.divergence: {config.name!r} has no reference; leave it at reverse_kl")
    elif config.divergence_alpha != defaults.divergence_alpha:
        raise UserError("config.objective.divergence_alpha is of objective.divergence='alpha_divergence'; set both")
    whole = [name for name in weights if name == SFT or LOSSES[name].over_batch]
    if config.weighting == WPO and whole:
        raise UserError(
            f"config.objective.weighting='wpo' weighs each pair by itself, and the loss {whole[0]!r} is one of a whole "
            "step; leave one of them out"
        )
    if config.cache_reference and config.ld_alpha != 1:
        raise UserError(
            "config.objective.cache_reference keeps one number of each answer, and objective.ld_alpha="
            f"{config.ld_alpha:g} takes answers apart; leave one of them at its default"
        )
    if config.cache_reference and config.reference_every:
        raise UserError(
            "config.objective.cache_reference is of a reference that stays, and with objective.reference_every="
            f"{config.reference_every} it moves; leave one of them at its default"
        )
    if "robust" in names and config.label_smoothing >= 0.5:
        raise UserError("config.objective.label_smoothing: of the loss 'robust' it must be below 0.5; 0.1 is usual")
    if "exo_pair" in names and not config.label_smoothing:
        raise UserError("config.objective.label_smoothing: the loss 'exo_pair' needs one above 0; 1e-3 is usual")
