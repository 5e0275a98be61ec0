"""Proximal policy optimization of what was sampled, with a critic beside the policy.

Advantages and returns come from outside (`ftjax.returns`), made once for all steps on the same completions.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.models import heads
from ftjax.models.decoder import Decoder
from ftjax.models.heads import VALUE
from ftjax.objectives.cross_entropy import PLAIN, per_token
from ftjax.objectives.head import head_of, make_unembed
from ftjax.objectives.logps import Batch, document_sums
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.reference import policy_and_reference

KL_COEF = "kl_coef"  # in the collection `kept`, see `training.state.kl_controller`, and in `Loss.kept`


def make_ppo(model: Decoder, config: ConfigDict, *, temperature: float = 1.0, max_new_tokens: int = 0) -> Objective:
    """The objective over batches of sampled completions, packed or not, each a document with its prompt.

    A batch has the arrays of `packing.BATCH`, `ROLLOUT` and `CRITIC`, and where the coefficient of the KL divergence
    follows it that of `KL`. The loss is that of the policy, - min(ratio A, clip(ratio) A) (Schulman et al. 2017,
    equation 7), plus `config.vf_coef` times that of the values, max((V - R)^2, (clip(V) - R)^2) / 2, clip(V) being held
    within `config.value_clip` of what V was when the completion was written: means over the sampled tokens of the whole
    step.

    Metrics have TRL's names and are means over the sampled tokens. temperature: of sampling. max_new_tokens: of a
    completion, on which nothing here depends.
    """
    unembed = make_unembed(model)
    sampled_from = lambda *given: unembed(*given) / temperature  # noqa: E731

    def ppo(variables, batch, rng):
        policy, _ = policy_and_reference(variables)
        rngs = None if rng is None else {"dropout": rng}
        hidden, _ = model.apply(policy, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
        head, values = head_of(model, policy), heads.values(policy, VALUE, hidden)[..., 0]
        found = per_token(sampled_from, None, PLAIN, head, hidden, batch["targets"], batch["weights"] != 0, rng)
        loss = ppo_loss(-found.loss, values, batch, config)
        return loss.replace(metrics=loss.metrics | {"policy/entropy_avg": (found.entropy.sum(), loss.weight)})

    return ppo


def ppo_loss(logps: jax.Array, values: jax.Array, batch: Batch, config: ConfigDict) -> Loss:
    """The loss of policy and values. logps, values: float32 [B, T], log p of the targets at the temperature of sampling
    and what the critic says before each. batch: see `make_ppo`.
    """
    sampled = batch["weights"] != 0
    # Where nothing was sampled there may be anything; NaN times 0 would be NaN.
    masked = lambda values: jnp.where(sampled, values, 0)  # noqa: E731
    there, names = sampled.astype(jnp.float32), ("advantages", "sampled_logps", "values", "returns")
    tokens = there.sum()
    logps, values, (advantages, old_logps, old_values, returns) = jax.tree.map(
        masked, (logps, values, tuple(batch[name] for name in names))
    )

    log_ratios = logps - old_logps
    ratios = jnp.exp(log_ratios)
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    free, clipped = -advantages * ratios, -advantages * jnp.clip(ratios, low, high)
    near = old_values + jnp.clip(values - old_values, -config.value_clip, config.value_clip)
    errors, errors_near = (values - returns) ** 2, (near - returns) ** 2
    of_policy = jnp.sum(jnp.maximum(free, clipped) * there)
    of_values = jnp.sum(jnp.maximum(errors, errors_near) * there) / 2
    means = {
        "policy/approxkl_avg": log_ratios**2 / 2,
        "policy/clipfrac_avg": clipped > free,
        "val/clipfrac_avg": errors_near > errors,
        "val/ratio": ratios,
        "sampling/logp_difference_mean": jnp.abs(log_ratios),
    }
    metrics = {name: (jnp.sum(its * there), tokens) for name, its in means.items()}
    metrics |= {"loss/policy_avg": (of_policy, tokens), "loss/value_avg": (of_values, tokens)}
    kept = {}
    if "kl" in batch:
        completions = (document_sums(there, batch["segment_ids"]) > 0).astype(jnp.float32).sum()
        kept[KL_COEF] = {"kl": masked(batch["kl"]).sum(), "completions": completions}
    return Loss(of_policy + config.vf_coef * of_values, tokens, metrics, kept=kept)
