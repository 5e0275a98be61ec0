"""Losses of a pair of answers, one of them preferred: the names, formulas and defaults of TRL's DPO trainer.

Each is a function of what a pair says about policy and reference (`Pairs`) and of config.objective, elementwise over
float32 [B, P] unless it says otherwise. h(y) = log p(y) - log p_reference(y) throughout; h is a sum over an answer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

log_sigmoid = jax.nn.log_sigmoid


class Pairs(NamedTuple):
    """Float32 [B, P] each: B rows with places for P pairs."""

    chosen: jax.Array  # log p of the answers, summed over their tokens
    rejected: jax.Array
    chosen_reference: jax.Array  # the same of the reference; 0 for methods without one
    rejected_reference: jax.Array
    chosen_tokens: jax.Array  # how many tokens of an answer are scored
    rejected_tokens: jax.Array
    there: jax.Array  # 1 where there is a pair in this place, else 0

    def ratios(self) -> tuple[jax.Array, jax.Array]:
        """h of the chosen and of the rejected answers."""
        return self.chosen - self.chosen_reference, self.rejected - self.rejected_reference


class PairLoss(NamedTuple):
    """A loss and what it reads.

    Attributes:
      function: (pairs, config.objective) -> float32 [B, P], of which places without a pair do not count.
      settings: the keys of config.objective that it reads beside `beta`.
      over_batch: it compares pairs with each other, so that all pairs of a step must be in one micro-batch.
      reference: it has a meaning only beside a reference.
    """

    function: Callable[[Pairs, ConfigDict], jax.Array]
    settings: tuple[str, ...] = ()
    over_batch: bool = False
    reference: bool = True


def scores(pairs: Pairs, config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """f'(exp h) of each answer for the divergence that holds the policy: h itself for the reverse KL of DPO.

    Wang et al. 2023 (arXiv 2309.16240), table 1.
    """
    return tuple(_score(ratio, config.divergence, config.divergence_alpha) for ratio in pairs.ratios())


def _score(ratio: jax.Array, divergence: str, alpha: float) -> jax.Array:
    if divergence == "forward_kl":
        return 1 - jnp.exp(-ratio)
    if divergence == "js_divergence":
        return math.log(2) + log_sigmoid(ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # its limit at 1 is the reverse KL
        return jnp.expm1(jnp.minimum((alpha - 1) * ratio, 80.0)) / (alpha - 1)  # exp(80) is still a float32
    return ratio


def _margin(pairs: Pairs, config: ConfigDict) -> jax.Array:
    chosen, rejected = scores(pairs, config)
    return config.beta * (chosen - rejected)


def _mean_margin(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """The difference of the scores for each scored token of their answer, without beta."""
    chosen, rejected = scores(pairs, config)
    return chosen / jnp.maximum(pairs.chosen_tokens, 1) - rejected / jnp.maximum(pairs.rejected_tokens, 1)


def _smoothed(margin: jax.Array, config: ConfigDict) -> jax.Array:
    """-log sigmoid(margin), where a share of the labels is taken to be wrong (Mitchell 2023, conservative DPO)."""
    smoothing = config.label_smoothing
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def sigmoid(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """DPO (Rafailov et al. 2023, equation 7); with label_smoothing conservative DPO."""
    return _smoothed(_margin(pairs, config), config)


def hinge(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """SLiC-HF (Zhao et al. 2023, equation 1) with the margin of RSO (Liu et al. 2023)."""
    return jax.nn.relu(1 - _margin(pairs, config))


def ipo(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Identity preference optimization (Azar et al. 2023, equation 17) by token, as its authors run it; beta: tau."""
    return (_mean_margin(pairs, config) - 1 / (2 * config.beta)) ** 2


def sigmoid_norm(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """DPO by token: lengths do not make a margin (Tulu 3, Lambert et al. 2024, section 5.1)."""
    return -log_sigmoid(config.beta * _mean_margin(pairs, config))


def exo_pair(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """KL from the policy's choice to a label that is right with 1 - label_smoothing (Ji et al. 2024, equation 16)."""
    margin, smoothing = _margin(pairs, config), config.label_smoothing
    right = jax.nn.sigmoid(margin) * (log_sigmoid(margin) - math.log1p(-smoothing))
    return right + jax.nn.sigmoid(-margin) * (log_sigmoid(-margin) - math.log(smoothing))


def robust(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Unbiased where a share label_smoothing of the labels is flipped (Chowdhury et al. 2024, equation 12)."""
    margin, flipped = _margin(pairs, config), config.label_smoothing
    return (-(1 - flipped) * log_sigmoid(margin) + flipped * log_sigmoid(-margin)) / (1 - 2 * flipped)


def nca_pair(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Noise contrastive alignment (Chen et al. 2024, section 3): the chosen answer's probability does not fall."""
    chosen, rejected = (config.beta * ratio for ratio in pairs.ratios())
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Binary classifier optimization (Jung et al. 2024) without its shift: each answer is judged by itself."""
    chosen, rejected = (config.beta * ratio for ratio in pairs.ratios())
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Self-play preference optimization (Wu et al. 2024, equation 4.7) for certain labels."""
    chosen, rejected = pairs.ratios()
    return (chosen - 0.5 / config.beta) ** 2 + (rejected + 0.5 / config.beta) ** 2


def apo_zero(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Anchored preference optimization (D'Oosterlinck et al. 2024, equation 7): chosen answers are better than ours."""
    chosen, rejected = pairs.ratios()
    return 1 - jax.nn.sigmoid(config.beta * chosen) + jax.nn.sigmoid(config.beta * rejected)


def apo_down(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Its equation 8: chosen answers are worse than ours; both fall, the rejected one further."""
    chosen, rejected = pairs.ratios()
    return jax.nn.sigmoid(config.beta * chosen) + 1 - jax.nn.sigmoid(config.beta * (chosen - rejected))


def discopop(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """The loss that a language model proposed (Lu et al. 2024, equation 5): logistic, exponential where it is sure."""
    margin = _margin(pairs, config)
    share = margin / config.discopop_tau
    # The exponential's share and the exponential in one: the product of 0 and infinity would be NaN.
    return -jax.nn.sigmoid(-share) * log_sigmoid(margin) + jnp.exp(log_sigmoid(share) - margin)


def aot(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """Alignment via optimal transport (Melnyk et al. 2024): our margins, in order, against the reference's in order."""
    ours, theirs = pairs.chosen - pairs.rejected, pairs.chosen_reference - pairs.rejected_reference
    return _in_order(ours, theirs, pairs, config)


def aot_unpaired(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """The same of the chosen answers' ratios against those of the rejected ones, which need not belong together."""
    return _in_order(*pairs.ratios(), pairs, config)


def _in_order(left: jax.Array, right: jax.Array, pairs: Pairs, config: ConfigDict) -> jax.Array:
    """The smoothed loss of the i-th smallest of `left` less the i-th smallest of `right`, over all pairs there are."""
    beyond = jnp.where(pairs.there > 0, 0.0, 1e9)  # empty places sort behind all others, in both alike
    left, right = (jnp.sort((values * pairs.there + beyond).reshape(-1)) for values in (left, right))
    losses = _smoothed(config.beta * (left - right), config)
    # They stand at the front now; what is summed counts those places where pairs are, wherever these stand.
    count = pairs.there.sum()
    total = jnp.sum(jnp.where(jnp.arange(losses.size) < count, losses, 0.0))
    return jnp.broadcast_to(total / jnp.maximum(count, 1), pairs.there.shape)


def simpo(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """SimPO (Meng et al. 2024, equation 6): log p by token, a target margin `gamma`, no reference."""
    chosen = pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1)
    return _smoothed(config.beta * (chosen - rejected) - config.gamma, config)


def odds_ratio(pairs: Pairs, config: ConfigDict) -> jax.Array:
    """ORPO (Hong et al. 2024, equations 6 and 7): -log sigmoid of the log odds ratio of p by token, times beta."""
    chosen = pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1)
    rejected = pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1)
    return -config.beta * log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: jax.Array) -> jax.Array:
    """log(p / (1 - p)); p = 1, in places without a pair, is moved off its pole."""
    logp = jnp.minimum(logp, -1e-6)
    return logp - jnp.log(-jnp.expm1(logp))


_BY_MARGIN = ("divergence", "divergence_alpha")
LOSSES = {
    "sigmoid": PairLoss(sigmoid, ("label_smoothing", *_BY_MARGIN), reference=False),
    "hinge": PairLoss(hinge, _BY_MARGIN, reference=False),
    "ipo": PairLoss(ipo, _BY_MARGIN, reference=False),
    "exo_pair": PairLoss(exo_pair, ("label_smoothing", *_BY_MARGIN)),
    "nca_pair": PairLoss(nca_pair),
    "robust": PairLoss(robust, ("label_smoothing", *_BY_MARGIN)),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "aot": PairLoss(aot, ("label_smoothing",), over_batch=True),
    "aot_unpaired": PairLoss(aot_unpaired, ("label_smoothing",), over_batch=True),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "discopop": PairLoss(discopop, ("discopop_tau", *_BY_MARGIN)),
    "sigmoid_norm": PairLoss(sigmoid_norm, _BY_MARGIN),
    "simpo": PairLoss(simpo, ("label_smoothing", "gamma"), reference=False),
    "odds_ratio": PairLoss(odds_ratio, reference=False),
}
