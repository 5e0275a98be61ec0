"""Next-token cross-entropy that never holds the logits of more than one chunk of positions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(
    unembed: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = 128,
) -> dict[str, jax.Array]:
    """Weighted sums of loss, correct predictions and entropy over all positions.

    unembed: hidden [B, c, D] -> float32 logits [B, c, vocab]; hidden [B, T, D]; targets int32 [B, T];
    weights float32 [B, T], 0 where a position is not trained on. Returns float32 scalars `loss`, `correct`, `entropy`.

    Positions are taken `chunk` at a time along T, and their logits are computed again in the backward pass instead of
    kept. The trained positions of every row are brought to its front first, so that chunks without any are skipped:
    prompts do not pay for the head.
    """
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, weights = (jnp.take_along_axis(array, order, axis=1) for array in (targets, weights))

    def chunks(array):
        array = jnp.pad(array, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(batch, -1, chunk, *array.shape[2:]), 1, 0)

    def sums(hidden, targets, weights):
        logits = unembed(hidden)
        log_norm = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # The entropy is a metric: without its gradient the backward pass needs one logits-sized buffer fewer.
        fixed = jax.lax.stop_gradient(logits)
        entropy = log_norm - jnp.sum(jax.nn.softmax(fixed, axis=-1) * fixed, axis=-1)
        return {
            "loss": jnp.sum((log_norm - target_logits) * weights),
            "correct": jnp.sum((jnp.argmax(fixed, axis=-1) == targets) * weights),
            "entropy": jax.lax.stop_gradient(jnp.sum(entropy * weights)),
        }

    zeros = dict.fromkeys(("loss", "correct", "entropy"), jnp.zeros((), jnp.float32))

    @jax.checkpoint
    def body(totals, chunk_of):
        hidden, targets, weights = chunk_of
        new = jax.lax.cond(jnp.any(weights != 0), sums, lambda *_: zeros, hidden, targets, weights)
        return jax.tree.map(jnp.add, totals, new), None

    totals, _ = jax.lax.scan(body, zeros, tuple(map(chunks, (hidden, targets, weights))))
    return totals
