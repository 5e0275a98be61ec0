"""Reward models: a head, or several, learns from pairs of answers which one is better."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.logps import pair_sums
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.scores import Batch, is_last, scores

REWARDS = "rewards"  # in the collection `kept`, see `training.state.reward_sums`


def make_reward(model: Decoder, config: ConfigDict, seed: int = 0) -> Objective:
    """The objective over batches of ranked pairs, packed or not, whose labels are their margins (`data.tokens.kinds`).

    The loss of a pair is -log p(chosen is better), p being sigmoid(r_chosen - r_rejected - margin) (Stiennon et al.
    2020, equation 1; Llama 2, Touvron et al. 2023, equation 2), plus `config.center_coef` (r_chosen + r_rejected)^2,
    which holds rewards around 0 (Eisenstein et al. 2023). A reward r is what the head says at an answer's last token.
    Where a pair says the probability q of chosen being better, it is -q log p - (1 - q) log(1 - p), the cross-entropy
    against that soft label (Bai et al. 2022, arXiv 2212.08073, section 4.1).
    With `config.label_noise` e it is (1 - e) p + e / 2: a share e of the labels is drawn at random (Christiano et al.
    2017, section 2.2.3). The sum is over pairs, and its weight is their number.

    With `config.ensemble` heads each learns from its own bootstrap of the pairs in training, and the loss is the mean
    over heads. Metrics have TRL's names and are of the mean reward of the heads; beside them `brier` and `confidence`
    are of its p for the label and for the answer that it prefers, and `disagreement` is the variance over the heads of
    r_chosen - r_rejected.

    seed: of the bootstrap.
    """

    def reward(variables, batch, rng):
        segments = batch["segment_ids"]
        last = is_last(segments)
        there, _ = pair_sums(last.astype(jnp.float32), segments)  # [B, P]: 1 where there is a pair, else 0
        margin, less = pair_sums(jnp.where(last, batch["labels"], 0), segments)
        doubt = margin - less  # the probability that rejected is better
        by_token = jnp.where(last[..., None], scores(model, variables, batch, rng), 0)
        chosen, rejected = jax.vmap(pair_sums, (-1, None), -1)(by_token, segments)  # [B, P, K]
        difference = chosen - rejected - margin[..., None]
        losses = -log_likelihood(difference, config.label_noise)
        # The terms of -(1 - doubt) log p - doubt log(1 - p) beyond -log p.
        losses += doubt[..., None] * (
            log_likelihood(difference, config.label_noise) - log_likelihood(-difference, config.label_noise)
        )
        losses += config.center_coef * (chosen + rejected) ** 2
        if config.ensemble > 1 and rng is not None:
            losses *= bootstrap(batch, config.ensemble, seed)
        count = there.sum()

        ours, theirs = chosen.mean(-1), rejected.mean(-1)
        likelihood = jnp.exp(log_likelihood(ours - theirs, config.label_noise))
        metrics = {
            "accuracy": (ours > theirs).astype(jnp.float32),
            "margin": ours - theirs,
            "mean_reward": (ours + theirs) / 2,
            "brier": (1 - doubt - likelihood) ** 2,
            "confidence": jnp.maximum(likelihood, 1 - likelihood),
        }
        if config.ensemble > 1:
            metrics["disagreement"] = (chosen - rejected).var(-1)
        lowest = jnp.where(there > 0, jnp.minimum(ours, theirs), jnp.inf).min()
        highest = jnp.where(there > 0, jnp.maximum(ours, theirs), -jnp.inf).max()
        return Loss(
            jnp.sum(losses.mean(-1) * there),
            count,
            {name: (jnp.sum(values * there), count) for name, values in metrics.items()},
            {"reward": (lowest, highest)},
            {
                REWARDS: {
                    "count": 2 * count,
                    "sum": jnp.sum((chosen + rejected) * there[..., None], (0, 1)),
                    "squares": jnp.sum((chosen**2 + rejected**2) * there[..., None], (0, 1)),
                }
            },
        )

    return reward


def log_likelihood(difference: jax.Array, noise: float) -> jax.Array:
    """log((1 - noise) sigmoid(difference) + noise / 2), elementwise and stable for any difference."""
    certain = jax.nn.log_sigmoid(difference)
    return jnp.logaddexp(math.log1p(-noise) + certain, math.log(noise / 2)) if noise else certain


# Of Poisson(1): its distribution function at 0, 1, ..., in units of 2^-32.
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)]) * 2**32


def bootstrap(batch: Batch, count: int, seed: int) -> jax.Array:
    """float32 [B, P, count]: how often each head's bootstrap of the pairs has a pair; Poisson(1), as of many pairs.

    It is a function of the pair's tokens, the head and the seed. So a pair has the same weight in every epoch, wherever
    it stands in a batch.
    """
    segments = batch["segment_ids"]
    place = (2 * batch["positions"] + segments % 2).astype(jnp.uint32)  # in its pair
    by_token = _mixed(_mixed(batch["tokens"].astype(jnp.uint32)) + place)
    of_chosen, of_rejected = pair_sums(by_token, segments)  # modulo 2^32, in which no order of a sum matters
    keys = jax.vmap(jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(seed), pair)))(of_chosen + of_rejected)
    bits = jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (count,))))(keys)
    return (bits[..., None] >= jnp.asarray(_POISSON.astype(np.uint32))).sum(-1).astype(jnp.float32)


def _mixed(values: jax.Array) -> jax.Array:
    """uint32 -> uint32, one to one, every bit depending on all of them: how MurmurHash3 (Appleby) ends."""
    values = (values ^ values >> 16) * jnp.uint32(0x85EBCA6B)
    values = (values ^ values >> 13) * jnp.uint32(0xC2B2AE35)
    return values ^ values >> 16
