"""Learning from sampled completions by their advantages: GRPO and its kin, with the names of TRL's trainer.

Advantages come from outside, and so does how likely each token was when it was drawn. All here is about what one step
makes of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.config import KEYS
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.head import at_temperature, make_unembed
from ftjax.objectives.logps import Batch, document_sums, of_tokens, token_logps
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.preference import mixture
from ftjax.objectives.reference import policy_and_moving_reference

COMPLETIONS, TOKENS, LENGTH = "completions", "tokens", "length"
TOKEN, SEQUENCE = "token", "sequence"  # config.importance
PRODUCT = "product"  # and of RLOO: the ratio of a whole completion, not the mean over its tokens


class PolicyLoss(NamedTuple):
    """A loss and what it reads.

    Attributes:
      function: (ratios, log p, advantages, config.objective) -> (losses, {metric: where it counts as 1}), all [B, T];
        a ratio is p / p when sampled, or before the round. What is said of tokens without a weight does not count.
      over: what the loss is a mean over. COMPLETIONS: of means over tokens; TOKENS: all of a step; LENGTH: completions,
        as if each were as long as may be.
      settings: the keys of config.objective that it reads and not every loss does.
    """

    function: Callable[[jax.Array, jax.Array, jax.Array, ConfigDict], tuple[jax.Array, dict[str, jax.Array]]]
    over: str
    settings: tuple[str, ...]


def _clipped(ratios, logps, advantages, config):
    """Schulman et al. 2017, equation 7; with an upper bound of its own DAPO's clip-higher (Yu et al. 2025)."""
    low, high = 1 - config.epsilon, 1 + _upper(config)
    losses = -jnp.minimum(ratios * advantages, jnp.clip(ratios, low, high) * advantages)
    is_low, is_high = (ratios < low) & (advantages < 0), (ratios > high) & (advantages > 0)
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    return losses, dict(zip(names, (is_low, is_high, is_low | is_high), strict=True))


def _weighted(ratios, logps, advantages, config):
    """REINFORCE, whose weights alone are clipped: no token loses its gradient (MiniMax-M1 2025, equations 4, 5)."""
    weights = jax.lax.stop_gradient(jnp.minimum(ratios, _upper(config)))
    return -weights * advantages * logps, {"cispo_clip_ratio": (ratios > _upper(config)) & (advantages > 0)}


def _gated(ratios, logps, advantages, config):
    """A gate that closes gradually as the ratio leaves 1, with slope 1 there (Gao et al. 2025, arXiv 2511.20347)."""
    temperature = jnp.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -advantages * jax.nn.sigmoid(temperature * (ratios - 1)) * 4 / temperature, {}


def _upper(config: ConfigDict) -> float:
    return config.epsilon_high or config.epsilon


_CLIP, _GATE = ("epsilon", "epsilon_high"), ("sapo_temperature_pos", "sapo_temperature_neg")

LOSSES = {
    "grpo": PolicyLoss(_clipped, COMPLETIONS, _CLIP),  # Shao et al. 2024 (arXiv 2402.03300), equation 3
    "dr_grpo": PolicyLoss(_clipped, LENGTH, _CLIP),  # Liu et al. 2025 (arXiv 2503.20783), section 3.2
    "dapo": PolicyLoss(_clipped, TOKENS, _CLIP),  # Yu et al. 2025 (arXiv 2503.14476), equation 8
    # In TRL a mean over the tokens of a micro-batch. Nothing here depends on those, so it is dapo by another name.
    "bnpo": PolicyLoss(_clipped, TOKENS, _CLIP),
    "cispo": PolicyLoss(_weighted, TOKENS, ("epsilon_high",)),
    "sapo": PolicyLoss(_gated, COMPLETIONS, _GATE),
}


def make_policy(model: Decoder, config: ConfigDict, *, temperature: float = 1.0, max_new_tokens: int) -> Objective:
    """The objective over batches of sampled completions, packed or not, each a document with its prompt.

    A batch has `packing.BATCH`, its weights 1 where the target was sampled, the end token included, and float32 [B, T],
    aligned with the targets, `advantages` and `sampled_logps`: log p of the target under the distribution that it was
    drawn from. What these two have where the weight is 0 does not matter, even NaN.

    With the arrays of `packing.CORRECTED` the policy is held near what it was before the round, and not near what drew
    the tokens: ratios are p / p_old, and `correction`, p_old / p_sampled within bounds (`returns.correction`), is what
    a token's loss counts, though not its KL divergence (decoupled: Hilton et al. 2021, arXiv 2110.00641; Fu et al.
    2025, arXiv 2505.24298; as in TRL).

    `config.loss` names one of LOSSES (dapo where it is empty). The ratio of a token is p / p when sampled, p being at
    the temperature of sampling, and with `config.importance` "sequence" the geometric mean of these over its completion
    (GSPO, Zheng et al. 2025, arXiv 2507.18071, equation 7; meant for the loss grpo). It is clipped to 1 - `epsilon` and
    1 + `epsilon_high` (`epsilon` where that is 0). cispo holds the ratio itself below `epsilon_high`, for which 5 is
    usual; below 1, as with `epsilon` alone, it would clip every ratio that is near 1.

    `config.kl_coef` times an estimate of KL(policy || reference) of each token is added, by r - 1 - log r,
    r = p_reference / p (Schulman 2020, the third; DeepSeekMath, equation 4), both at that temperature.

    Loss and gradient are sums, over completions or over tokens, so that they do not depend on micro-batches, packing or
    devices. A completion with the advantage 0, as of a group of equal rewards, counts: it is part of what the loss is a
    mean over, and its KL holds the policy. One without any weight, such as one that was cut, counts nowhere.

    Metrics have TRL's names and are means over tokens; with sequence ratios those of clipping are over completions.

    temperature: of sampling. max_new_tokens: how long a completion may be, by which dr_grpo divides.

    Raises:
      UserError: an unknown loss, several, a setting that the loss does not use, or a temperature of 0.
    """
    name = _name_of(config)
    if not temperature > 0:
        raise UserError(f"a policy learns from answers that were drawn, not at temperature {temperature:g}; 1 is usual")
    unembed = at_temperature(temperature, make_unembed(model))

    def policy(variables, batch, rng):
        ours, frozen = policy_and_moving_reference(variables)
        found = of_tokens(model, unembed, ours, batch, rng)
        theirs = None
        if config.kl_coef:
            # Never dropout here: the reference is what the model says, not a noisy version of it.
            theirs = jax.lax.stop_gradient(token_logps(model, unembed, frozen, batch, None))
        loss = policy_loss(name, -found.loss, theirs, batch, config, max_new_tokens)
        tokens = (batch["weights"] != 0).astype(jnp.float32).sum()
        return loss.replace(metrics=loss.metrics | {"entropy": (found.entropy.sum(), tokens)})

    return policy


def make_rloo(model: Decoder, config: ConfigDict, *, temperature: float = 1.0, max_new_tokens: int) -> Objective:
    """REINFORCE with the ratio of whole completions, clipped as PPO's (Ahmadian et al. 2024, arXiv 2402.14740; TRL's).

    As `make_policy`, whose batches these are; a KL divergence is part of the advantages. On policy its gradient is that
    of - advantage log p of the completion, a mean over completions.
    """
    fixed = {"loss": ("grpo",), "importance": PRODUCT, "kl_coef": 0.0}
    config = ConfigDict(config.to_dict() | fixed)
    return make_policy(model, config, temperature=temperature, max_new_tokens=max_new_tokens)


def policy_loss(
    name: str, logps: jax.Array, reference_logps: jax.Array | None, batch: Batch, config: ConfigDict, longest: int
) -> Loss:
    """The loss `name` of log p of the targets, of policy and reference (None without `config.kl_coef`).

    logps, reference_logps: float32 [B, T], at the temperature of sampling. batch, longest: see `make_policy`.
    """
    trained, segments = batch["weights"] != 0, batch["segment_ids"]
    # Where nothing is trained on there may be anything; NaN times 0 would be NaN.
    masked = lambda values: jnp.where(trained, values, 0)  # noqa: E731
    sampled = masked(batch["sampled_logps"])
    old = masked(batch["old_logps"]) if "old_logps" in batch else sampled
    logps, advantages = map(masked, (logps, batch["advantages"]))
    there = trained.astype(jnp.float32)
    lengths = document_sums(there, segments)
    tokens, completions = there.sum(), (lengths > 0).astype(jnp.float32).sum()
    share = there / jnp.maximum(_by_token(lengths, segments), 1)  # sums to 1 over a completion

    metrics = {"sampling/logp_difference_mean": (jnp.abs(logps - sampled).sum(), tokens)}
    log_ratios = logps - old
    each, count = (there, tokens) if config.importance == TOKEN else (share, completions)
    if config.importance != TOKEN:
        counts = share if config.importance == SEQUENCE else there
        log_ratios = masked(_by_token(document_sums(log_ratios * counts, segments), segments))
    losses, clipped = LOSSES[name].function(jnp.exp(log_ratios), logps, advantages, config)
    metrics |= {metric: (jnp.sum(where * each), count) for metric, where in clipped.items()}
    if "correction" in batch:
        losses *= masked(batch["correction"])
    if config.kl_coef:
        less = masked(reference_logps) - logps
        kl = jnp.expm1(less) - less
        losses += config.kl_coef * kl
        metrics["kl"] = (kl.sum(), tokens)
    over = LOSSES[name].over
    counted = {COMPLETIONS: share, TOKENS: there, LENGTH: there / longest}[over]
    return Loss(jnp.sum(losses * counted), tokens if over == TOKENS else completions, metrics)


def _by_token(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, T]: at each token what `values`, [B, N], have for its document; any of them at padding."""
    return jnp.take_along_axis(values, jnp.maximum(segment_ids - 1, 0), axis=1)


def _name_of(config: ConfigDict) -> str:
    (name, weight), *more = mixture(config, (("dapo", 1.0),), tuple(LOSSES))
    if more or weight != 1:
        raise UserError(
            f"config.objective.loss={tuple(config.loss)}: losses of sampled answers are means over different things, "
            f"which have no sum; name one of {', '.join(LOSSES)}, without a weight"
        )
    for key in (*_CLIP, *_GATE):
        default = KEYS[f"objective.{key}"].default
        if key not in LOSSES[name].settings and config[key] != default:
            users = ", ".join(other for other, loss in LOSSES.items() if key in loss.settings)
            raise UserError(
                f"config.objective.{key}={config[key]!r} does nothing with the loss {name}; leave it at its default, "
                f"or use {users}"
            )
    if name == "cispo" and not config.epsilon_high:
        raise UserError(
            "config.objective.loss: cispo holds the ratio itself below config.objective.epsilon_high, which is to be "
            "above 1; --config.objective.epsilon_high=5 is usual"
        )
    return name
