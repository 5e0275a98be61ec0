"""Proximal policy optimization of what was sampled, with a critic beside the policy, and the pretraining mix (PPO-ptx).

Advantages and returns come from outside (`ftjax.returns`), made once for all steps on the same completions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.models import heads
from ftjax.models.decoder import Decoder
from ftjax.models.heads import VALUE
from ftjax.objectives.cross_entropy import PLAIN, per_token
from ftjax.objectives.head import at_temperature, head_of, make_unembed
from ftjax.objectives.logps import Batch, document_sums
from ftjax.objectives.loss import TOTALS, Loss, Objective
from ftjax.objectives.reference import policy_and_reference
from ftjax.tree import Tree

KL_COEF = "kl_coef"  # in the collection `kept`, see `training.state.kl_controller`, and in `Loss.kept`


def make_ppo(model: Decoder, config: ConfigDict, *, temperature: float = 1.0, max_new_tokens: int = 0) -> Objective:
    """The objective over batches of sampled completions, packed or not, each a document with its prompt.

    A batch has the arrays of `packing.BATCH`, `ROLLOUT` and `CRITIC`, and where the coefficient of the KL divergence
    follows it that of `KL`. The loss is that of the policy, - min(ratio A, clip(ratio) A) (Schulman et al. 2017,
    equation 7), plus `config.vf_coef` times that of the values, max((V - R)^2, (clip(V) - R)^2) / 2, clip(V) being held
    within `config.value_clip` of what V was when the completion was written: means over the sampled tokens of the whole
    step. The arrays of `CORRECTED` do to the policy's loss what `policy.make_policy` says; values are not corrected.

    With `config.ptx_coef` a batch has the array of `PTX`, too, and rows of texts and conversations beside the
    completions. So much of their mean cross-entropy, over the trained tokens of all of them in the step, is added
    (Ouyang et al. 2022, section 3.5). They reach nothing else, and it is at temperature 1 whatever that of sampling is.

    Metrics have TRL's names and are means over the sampled tokens. temperature: of sampling. max_new_tokens: of a
    completion, on which nothing here depends.
    """
    unembed = make_unembed(model)
    sampled_from = at_temperature(temperature, unembed)

    def ppo(variables, batch, rng):
        policy, _ = policy_and_reference({name: part for name, part in variables.items() if name != TOTALS})
        rngs = None if rng is None else {"dropout": rng}
        hidden, _ = model.apply(policy, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
        head, values = head_of(model, policy), heads.values(policy, VALUE, hidden)[..., 0]
        sampled, others = _sides(batch)
        found = per_token(sampled_from, None, PLAIN, head, hidden, batch["targets"], sampled, rng)
        loss = ppo_loss(-found.loss, values, batch, config)
        metrics = loss.metrics | {"policy/entropy_avg": (found.entropy.sum(), loss.weight)}
        if not config.ptx_coef:
            return loss.replace(metrics=metrics)
        nll = per_token(unembed, None, PLAIN, head, hidden, batch["targets"], others, rng).loss.sum()
        # What divides the sum is the number of sampled tokens in the whole step, and here should be that of the others.
        counts = variables[TOTALS] if TOTALS in variables else _counts(batch)
        share = counts["sampled"] / jnp.maximum(counts["ptx"], 1)
        metrics["loss/ptx_avg"] = (nll, _counts(batch)["ptx"])
        return loss.replace(sum=loss.sum + config.ptx_coef * share * nll, metrics=metrics)

    return ppo


def make_ppo_totals(model: Decoder, config: ConfigDict) -> Callable[[Tree, Batch], dict[str, jax.Array]] | None:
    """(variables, batch) -> the tokens of a step: sampled ones and those of other rows; None where there are none."""
    return (lambda variables, batch: _counts(batch)) if config.ptx_coef else None


def ppo_loss(logps: jax.Array, values: jax.Array, batch: Batch, config: ConfigDict) -> Loss:
    """The loss of policy and values. logps, values: float32 [B, T], log p of the targets at the temperature of sampling
    and what the critic says before each. batch: see `make_ppo`.
    """
    sampled, _ = _sides(batch)
    # Where nothing was sampled there may be anything; NaN times 0 would be NaN.
    masked = lambda values: jnp.where(sampled, values, 0)  # noqa: E731
    there, names = sampled.astype(jnp.float32), ("advantages", "sampled_logps", "values", "returns")
    tokens = there.sum()
    logps, values, (advantages, sampled_logps, old_values, returns) = jax.tree.map(
        masked, (logps, values, tuple(batch[name] for name in names))
    )
    old_logps = masked(batch["old_logps"]) if "old_logps" in batch else sampled_logps
    counts = masked(batch["correction"]) if "correction" in batch else there

    log_ratios = logps - old_logps
    ratios = jnp.exp(log_ratios)
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    free, clipped = -advantages * ratios, -advantages * jnp.clip(ratios, low, high)
    near = old_values + jnp.clip(values - old_values, -config.value_clip, config.value_clip)
    errors, errors_near = (values - returns) ** 2, (near - returns) ** 2
    of_policy = jnp.sum(jnp.maximum(free, clipped) * counts)
    of_values = jnp.sum(jnp.maximum(errors, errors_near) * there) / 2
    means = {
        "policy/approxkl_avg": log_ratios**2 / 2,
        "policy/clipfrac_avg": clipped > free,
        "val/clipfrac_avg": errors_near > errors,
        "val/ratio": ratios,
        "sampling/logp_difference_mean": jnp.abs(logps - sampled_logps),
    }
    metrics = {name: (jnp.sum(its * there), tokens) for name, its in means.items()}
    metrics |= {"loss/policy_avg": (of_policy, tokens), "loss/value_avg": (of_values, tokens)}
    kept = {}
    if "kl" in batch:
        completions = (document_sums(there, batch["segment_ids"]) > 0).astype(jnp.float32).sum()
        kept[KL_COEF] = {"kl": masked(batch["kl"]).sum(), "completions": completions}
    return Loss(of_policy + config.vf_coef * of_values, tokens, metrics, kept=kept)


def _sides(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """bool [B, T] each: where a token was sampled, and where one of other rows is trained on."""
    trained = batch["weights"] != 0
    others = batch["ptx"] > 0 if "ptx" in batch else jnp.zeros_like(trained)
    return trained & ~others, trained & others


def _counts(batch: Batch) -> dict[str, jax.Array]:
    sampled, others = _sides(batch)
    return {"sampled": sampled.astype(jnp.float32).sum(), "ptx": others.astype(jnp.float32).sum()}
