"""From the scores of completions to what is learned from them: baselines, penalties and advantages, in float64.

Arrays by token are [completions, T], a completion's tokens standing where they are predicted, and `mask` says where
that is. What stands elsewhere never matters, even NaN.
"""

import numpy as np

_LEAST = 1e-4  # added to the standard deviation of rewards, as in TRL
_LEAST_VARIANCE = 1e-8  # added to that of advantages over tokens, as in TRL


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
