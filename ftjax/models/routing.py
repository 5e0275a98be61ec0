"""Which experts of a mixture each token goes to, and what each of them counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.spec import Experts

NOTES = "routers"  # the collection in which routers note what they did, where `apply` is told that it may change


def is_correction(path: str) -> bool:
    """Whether a parameter is what routers add to scores where they choose: float32 always, and without a gradient."""
    return path.endswith("/correction")


def note(module: nn.Module, logits: jax.Array, chosen: jax.Array, experts: Experts, segment_ids: jax.Array) -> None:
    """Notes sums over the tokens that are no padding, float32: `given` [experts], to how many each was chosen; `liked`
    [experts], the scores of a token made to sum to 1; `z` [], log(Z)^2 of its logits; `tokens` [].

    logits float32 [B, T, experts]; chosen int32 [B, T, per_token]; segment_ids int32 [B, T]. `given` has no gradient.
    """
    if not module.is_mutable_collection(NOTES) or module.is_initializing():
        return
    real = (segment_ids > 0).astype(jnp.float32)[..., None]
    scores = jax.nn.sigmoid(logits) if experts.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    notes = {
        "given": (jax.nn.one_hot(chosen, experts.count).sum(axis=-2) * real).sum(axis=(0, 1)),
        "liked": (scores / scores.sum(axis=-1, keepdims=True) * real).sum(axis=(0, 1)),
        "z": (z * z * real).sum(),
        "tokens": real.sum(),
    }
    for name, value in notes.items():
        module.sow(NOTES, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def route(logits: jax.Array, experts: Experts, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """float32 logits [..., experts] -> (weights float32 [..., per_token], experts int32 [..., per_token]).

    correction float32 [experts] or [1, experts], of which no gradient is taken: where it is given, experts are chosen
    by their scores and it, and weighed by the scores alone (Wang et al. 2024, arXiv 2408.15664). Groups: DeepSeek-AI
    2024, arXiv 2405.04434, section 2.1.2 ("max"), and arXiv 2412.19437, section 2.1.2 ("top2").
    """
    if experts.score == "sparsemixer":
        return _sparsemixer(logits, experts.slack)
    softmax = experts.score == "softmax"
    if softmax and experts.normalize and correction is None and experts.groups is None:
        # A softmax over the chosen logits alone is the softmax over all of them made to sum to 1, and cheaper.
        top, chosen = jax.lax.top_k(logits, experts.per_token)
        return jax.nn.softmax(top, axis=-1) * experts.scale, chosen
    scores = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
    liked = jax.lax.stop_gradient(scores if correction is None else scores + correction.astype(scores.dtype))
    if experts.groups is not None:
        liked = _in_best_groups(liked, *experts.groups, experts.group_score)
    elif correction is None:  # in the scores' order, without their rounding to 1
        liked = jax.lax.stop_gradient(logits)
    _, chosen = jax.lax.top_k(liked, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights * experts.scale, chosen


def _sparsemixer(logits: jax.Array, slack: float) -> tuple[jax.Array, jax.Array]:
    """As `route`, of two experts per token: the best, and the best of the others.

    Each has its share in a softmax over those of logits near its own: (best - s) / max(|s|, best) is at most 2 slack
    (Liu et al. 2024, arXiv 2409.12136). That is its rule for inference. In the training of Phi-3.5-MoE experts were
    drawn by these shares, with another gradient; here the best are taken in training, too.
    """
    weights, chosen, left = [], [], logits
    for _ in range(2):
        best, index = left.max(axis=-1, keepdims=True), left.argmax(axis=-1)[..., None]
        is_far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * slack
        shares = jax.nn.softmax(jnp.where(jax.lax.stop_gradient(is_far), -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(shares, index, axis=-1))
        chosen.append(index)
        left = jnp.where(index == jnp.arange(logits.shape[-1]), -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1).astype(jnp.int32)


def _in_best_groups(liked: jax.Array, groups: int, used: int, score: str) -> jax.Array:
    """[..., experts] with -inf outside the best `used` of `groups` equal runs of experts."""
    apart = liked.reshape(*liked.shape[:-1], groups, -1)
    _, best = jax.lax.top_k(jax.lax.top_k(apart, 2 if score == "top2" else 1)[0].sum(axis=-1), used)
    kept = (best[..., None] == jnp.arange(groups)).any(axis=-2)
    return jnp.where(kept[..., None], apart, -jnp.inf).reshape(liked.shape)
