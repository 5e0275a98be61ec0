"""From the scores of completions to what is learned from them: baselines, penalties and advantages, in float64.

Arrays by token are [completions, T], a completion's tokens standing where they are predicted, and `mask` says where
that is. What stands elsewhere never matters, even NaN.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

_LEAST = 1e-4  # added to the standard deviation of rewards, as in TRL
_LEAST_VARIANCE = 1e-8  # added to that of advantages over tokens, as in TRL
_LARGEST = 700.0  # whose exponential is a float64


class Round(NamedTuple):
    """What is known of the completions of a round, those of a prompt beside each other.

    Attributes:
      scores: float64 [completions], what each is worth.
      ended: bool [completions]: it came to an end, and was not cut.
      mask: bool [completions, T].
      logps: of its tokens under the distribution that they were drawn from; where that is corrected for, under the
        policy's own before the round.
      reference_logps: under that of the reference, at the same temperature; None where it is not asked.
      values: of a critic before each token, of what is still to come; None where there is none.
      samples: completions of a prompt.
    """

    scores: np.ndarray
    ended: np.ndarray
    mask: np.ndarray
    logps: np.ndarray
    reference_logps: np.ndarray | None
    values: np.ndarray | None
    samples: int


def correction(
    config: ConfigDict, logps: np.ndarray, sampled_logps: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """(what each token counts, float64 [completions, T], 0 outside of the mask; metrics with TRL's names)

    Importance sampling: p / p_sampled, where p is the policy's at the start of a round and p_sampled that of what drew
    the token, which has older weights or computes otherwise. Such a ratio is unbiased and of any variance, so
    `config.correction` bounds it: "truncate" holds it between `correction_min` and `correction_max` (Ionides 2008,
    "Truncated importance sampling"), "mask" makes it 0 outside of them; after "token_" the ratio of a token, after
    "sequence_" that of its whole completion, their product.
    """
    there = mask.any(axis=1)
    apart = masked(logps, mask) - masked(sampled_logps, mask)
    level, _, how = config.correction.partition("_")
    if level == "sequence":
        apart = np.broadcast_to(apart.sum(axis=1, keepdims=True), apart.shape)
    ratios, low, high = np.exp(np.minimum(apart, _LARGEST)), config.correction_min, config.correction_max
    weights = np.clip(ratios, low, high) if how == "truncate" else np.where((ratios < low) | (ratios > high), 0, ratios)
    each = weights[:, 0][there] if level == "sequence" else weights[mask]
    apart = np.abs(np.float64(logps[mask]) - sampled_logps[mask])
    metrics = {}
    for name, values in (("importance_sampling_ratio", each), ("sampling_logp_difference", apart)):
        for of in ("min", "mean", "max"):
            metrics[f"sampling/{name}/{of}"] = float(getattr(np, of)(values)) if len(values) else 0.0
    del metrics["sampling/sampling_logp_difference/min"]
    return np.where(mask, weights, 0.0), metrics


class Learned(NamedTuple):
    """What a round is worth learning.

    Attributes:
      by_completion: float64 [completions], how much better each is than was to be expected.
      by_token: {array of a batch: float64 [completions, T]}, 0 outside of the mask.
    """

    by_completion: np.ndarray
    by_token: dict[str, np.ndarray]
    metrics: dict[str, float]


def of_groups(config: ConfigDict, known: Round, kl_coef: float) -> Learned:
    """GRPO: see `group_advantages`. Its KL divergence is part of the loss."""
    advantages = group_advantages(known.scores.reshape(-1, known.samples), config.scale_rewards).reshape(-1)
    return Learned(advantages, {"advantages": np.where(known.mask, advantages[:, None], 0.0)}, {})


def of_sequences(config: ConfigDict, known: Round, kl_coef: float) -> Learned:
    """RLOO and REINFORCE: the score less `kl_coef` times the sum of log p / p_reference over the completion, compared
    with that of others (Ahmadian et al. 2024, arXiv 2402.14740).
    """
    rewards, metrics = known.scores - config.missing_eos_penalty * ~known.ended, {}
    if known.reference_logps is not None:
        kl = kl_estimates(known.logps, known.reference_logps, known.mask, "k1")
        rewards = rewards - kl_coef * kl.sum(axis=1)
        metrics["kl"] = float(kl.sum() / max(known.mask.sum(), 1))
    advantages = rewards - baselines(rewards.reshape(-1, known.samples), config.baseline).reshape(-1)
    return Learned(advantages, {"advantages": np.where(known.mask, advantages[:, None], 0.0)}, metrics)


def of_tokens(config: ConfigDict, known: Round, kl_coef: float) -> Learned:
    """PPO: a reward for each token, of which the critic's values make advantages.

    The reward of a token is - `kl_coef` times the estimate of KL(policy || reference) there, and the last one's has the
    score too (Stiennon et al. 2020, section 3.4; Ouyang et al. 2022, section 3.5). Metrics have TRL's names.
    """
    scores = known.scores - config.missing_eos_penalty * ~known.ended
    mask, values = known.mask, masked(known.values, known.mask)
    kl = kl_estimates(known.logps, known.reference_logps, mask, config.kl_estimator)
    rewards = at_end(scores, mask) - kl_coef * kl
    advantages = gae(rewards, values, mask, config.discount, config.gae_lambda)
    logps = masked(known.logps, mask)
    metrics = {
        "objective/scores": scores.mean(),
        "objective/entropy": -logps.sum(axis=1).mean(),
        "objective/rlhf_reward": rewards.sum(axis=1).mean(),
        "objective/kl": kl.sum(axis=1).mean(),
        "objective/kl_coef": kl_coef,
    }
    by_token = {"advantages": whiten(advantages, mask), "values": values, "returns": advantages + values, "kl": kl}
    by_completion = advantages.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    return Learned(by_completion, by_token, {name: float(value) for name, value in metrics.items()})


def group_advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """How much better each completion is than the others of its prompt, float64 as rewards [prompts, samples].

    Shao et al. 2024 (arXiv:2402.03300, section 4.1.2): less the mean of the prompt's, and with scale "group" over their
    standard deviation, with "batch" over that of all, with "none" over nothing (Liu et al. 2025, arXiv:2503.20783).
    """
    centered = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centered
    deviation = rewards.std(axis=1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    return centered / (deviation + _LEAST)


def baselines(rewards: np.ndarray, of: str) -> np.ndarray:
    """What each completion is compared with, float64 as rewards [prompts, samples].

    of: "others", the mean of the other completions of its prompt, which leaves the gradient unbiased (Kool et al.
    2019); or "batch", the mean of all.
    """
    if of == "batch":
        return np.full(rewards.shape, rewards.mean())
    return (rewards.sum(axis=1, keepdims=True) - rewards) / (rewards.shape[1] - 1)


def kl_estimates(logps: np.ndarray, reference_logps: np.ndarray, mask: np.ndarray, estimator: str) -> np.ndarray:
    """float64: an estimate of KL(p || p_reference) at each token, which was drawn from p; 0 outside of the mask.

    With r = p_reference / p (Schulman 2020, "Approximating KL divergence"): k1 = -log r, unbiased; k2 = (log r)^2 / 2,
    biased, of low variance, never negative; k3 = r - 1 - log r, unbiased, of low variance, never negative.
    """
    log_ratio = masked(reference_logps, mask) - masked(logps, mask)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return np.expm1(log_ratio) - log_ratio


def at_end(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64 [completions, T]: each score [completions] at the last token of the mask, 0 elsewhere.

    That is the end token of a completion which has one, whichever it is, and never padding: no token is asked for its
    id.
    """
    last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return np.where(last, scores[:, None], 0.0)


def gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, discount: float, decay: float) -> np.ndarray:
    """float64 [completions, T]: generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    rewards, values: of each token [completions, T]. What follows a token is the next one of the mask, wherever that is;
    nothing follows the last. discount, decay: the paper's gamma and lambda.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    out = np.zeros(mask.shape)
    following, advantage = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        there = mask[:, t]
        error = rewards[:, t] + discount * following - values[:, t]
        advantage = np.where(there, error + discount * decay * advantage, advantage)
        following = np.where(there, values[:, t], following)
        out[:, t] = np.where(there, advantage, 0.0)
    return out


def whiten(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64: with the mean 0 and the variance 1 over the mask, in which n - 1 divides; 0 outside of it."""
    there = masked(values, mask)
    count = mask.sum()
    mean = there.sum() / max(count, 1)
    variance = (masked(there - mean, mask) ** 2).sum() / max(count - 1, 1)
    return masked((there - mean) / np.sqrt(variance + _LEAST_VARIANCE), mask)


def masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64: `values` where the mask is, 0 elsewhere."""
    return np.where(mask, values, 0).astype(np.float64)
