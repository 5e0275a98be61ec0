"""Which experts of a mixture each token goes to, and what each of them counts."""

import jax
import jax.numpy as jnp

from ftjax.models.spec import Experts


def route(logits: jax.Array, experts: Experts, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """float32 logits [..., experts] -> (weights float32 [..., per_token], experts int32 [..., per_token]).

    correction float32 [experts], no gradient of which is taken: where it is given, experts are chosen by their scores
    and it, and weighed by the scores alone (Wang et al. 2024, arXiv 2408.15664). Groups: DeepSeek-AI 2024, arXiv
    2405.04434, section 2.1.2 ("max"), and arXiv 2412.19437, section 2.1.2 ("top2").
    """
    softmax = experts.score == "softmax"
    if softmax and experts.normalize and correction is None and experts.groups is None:
        # A softmax over the chosen logits alone is the softmax over all of them made to sum to 1, and cheaper.
        top, chosen = jax.lax.top_k(logits, experts.per_token)
        return jax.nn.softmax(top, axis=-1) * experts.scale, chosen
    scores = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
    liked = jax.lax.stop_gradient(scores if correction is None else scores + correction.astype(scores.dtype))
    if experts.groups is not None:
        liked = _in_best_groups(liked, *experts.groups, experts.group_score)
    _, chosen = jax.lax.top_k(liked, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights * experts.scale, chosen


def _in_best_groups(liked: jax.Array, groups: int, used: int, score: str) -> jax.Array:
    """[..., experts] with -inf outside the best `used` of `groups` equal runs of experts."""
    apart = liked.reshape(*liked.shape[:-1], groups, -1)
    _, best = jax.lax.top_k(jax.lax.top_k(apart, 2 if score == "top2" else 1)[0].sum(axis=-1), used)
    kept = (best[..., None] == jnp.arange(groups)).any(axis=-2)
    return jnp.where(kept[..., None], apart, -jnp.inf).reshape(liked.shape)
