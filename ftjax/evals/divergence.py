"""How far a model's next-token distributions are from those of the model that it was."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import sharding
from ftjax.evals.likelihood import Item, batches, placed
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

LOGITS = 2**24  # of both models each, at a time: 64 MiB in float32


def divergences(
    model: Decoder,
    tuned: Tree,
    base: Tree,
    items: Sequence[Item],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """KL(base || tuned) at every place that predicts a token of a continuation, float32 [tokens], in nats.

    Each is the exact sum over the vocabulary of p_base (log p_base - log p_tuned). Where the continuation is what the
    base wrote, their sum is an estimate of the divergence of the whole answers, with the least variance that one sample
    allows ("RL's Razor", Shenfeld et al. 2025, arXiv 2509.04259, finds that it predicts forgetting).

    tuned, base: variables of one model, which may share arrays; the rest is as in `likelihood.log_likelihoods`.
    """
    found, done = {}, 0
    for batch in batches(model, items):
        values = jax.device_get(_forward(model, tuned, base, placed(batch.arrays)))
        found.update(zip(batch.indices.tolist(), batch.of_items(values), strict=True))
        done += len(batch.indices)
        if on_progress is not None:
            on_progress(done, len(items))
    return [found[index] for index in range(len(items))]


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Decoder, tuned: Tree, base: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """float32 [B, T]: the divergence of each place, 0 where it is not wanted."""
    shape, width = batch["tokens"].shape, model.spec.hidden_size
    columns = _columns(*shape, model.spec.vocab_size)

    def by_columns(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [T / columns, B, columns, ...]"""
        return jnp.moveaxis(x.reshape(shape[0], -1, columns, *x.shape[2:]), 1, 0)

    def hidden(variables: Tree) -> jax.Array:
        return model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])[0]

    def measured(block: tuple[jax.Array, ...]) -> jax.Array:
        of_tuned, of_base, wanted = block
        logits = (
            model.apply(variables, its.reshape(-1, width), method="unembed")
            for variables, its in ((tuned, of_tuned), (base, of_base))
        )
        log_q, log_p = (jax.nn.log_softmax(its) for its in logits)
        return jnp.where(wanted, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).reshape(wanted.shape), 0.0)

    def where_wanted(block: tuple[jax.Array, ...]) -> jax.Array:
        # A conditional, not a mask: padding costs no product.
        return jax.lax.cond(block[2].any(), measured, lambda block: jnp.zeros(block[2].shape, jnp.float32), block)

    values = jax.lax.map(where_wanted, tuple(map(by_columns, (hidden(tuned), hidden(base), batch["wanted"]))))
    return sharding.constrain(jnp.moveaxis(values, 0, 1).reshape(shape), None, None)  # whole, for every host


def _columns(rows: int, length: int, vocabulary: int) -> int:
    """How many places of each row are compared at a time: a divisor of `length`, within LOGITS where that can be."""
    most = min(max(LOGITS // (rows * vocabulary), 1), length)
    return next(size for size in range(most, 0, -1) if length % size == 0)
