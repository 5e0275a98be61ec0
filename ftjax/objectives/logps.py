"""Log-probabilities of documents: what every objective over whole answers is made of."""

import jax
import jax.numpy as jnp

from ftjax.models.decoder import Decoder
from ftjax.models.vision import images_of
from ftjax.objectives.cross_entropy import PLAIN, Further, PerToken, per_token
from ftjax.objectives.head import Unembed, head_of
from ftjax.tree import Tree

Batch = dict[str, jax.Array]


def token_logps(model: Decoder, unembed: Unembed, variables: Tree, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """float32 [B, T]: log p(target) at every position with a weight, 0 elsewhere; arguments as of `of_tokens`."""
    return -of_tokens(model, unembed, variables, batch, rng).loss * batch["weights"]


def of_tokens(
    model: Decoder, unembed: Unembed, variables: Tree, batch: Batch, rng: jax.Array | None, further: Further = PLAIN
) -> PerToken:
    """What the model says of the target of every position with a weight.

    batch: the arrays of `packing.BATCH`, [B, T]; rng: for dropout, None without it.
    """
    rngs = None if rng is None else {"dropout": rng}
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    hidden, _ = model.apply(variables, *given, images=images_of(batch), rngs=rngs)
    head = head_of(model, variables)
    return per_token(unembed, None, further, head, hidden, batch["targets"], batch["weights"] != 0, rng)


def pair_sums(values: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the first and the second document of each pair, float32 [B, P] each; 0 where a row has fewer pairs.

    values: float32 [B, T]; segment_ids: int32 [B, T], 1 and 2 for a row's first pair, 3 and 4 for its second, 0 for
    padding. P = T // 4, and 1 at least: a document has two tokens or more, so no row holds more pairs.
    """
    sums = document_sums(values, segment_ids, 2 * max(values.shape[1] // 4, 1))
    return sums[:, 0::2], sums[:, 1::2]


def document_sums(values: jax.Array, segment_ids: jax.Array, count: int | None = None) -> jax.Array:
    """float32 [B, count]: sums over each document of a row, the one of segment 1 first; 0 where there are fewer.

    values: float32 [B, T]; segment_ids: int32 [B, T]. count: T // 2 without; a document has two tokens or more.
    """
    segments = 1 + (values.shape[1] // 2 if count is None else count)
    sums = jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=segments))(values, segment_ids)
    return sums[:, 1:]


def shared_weights(weights: jax.Array, segment_ids: jax.Array, beyond: float) -> jax.Array:
    """float32 [B, T]: 1 at the first n scored tokens of both documents of a pair, n being the smaller of their numbers,
    and `beyond` at further ones. weights float32 and segment_ids int32 [B, T], as of `pair_sums`.
    """
    scored = (weights != 0).astype(jnp.float32)
    first, second = pair_sums(scored, segment_ids)
    shared = jnp.repeat(jnp.minimum(first, second), 2, axis=1)  # by document
    before = jnp.cumsum(jnp.stack([first, second], -1).reshape(*first.shape[:-1], -1), axis=1)
    starts = jnp.pad(before, [(0, 0), (1, 0)])[:, :-1]  # scored tokens of the row before each document
    document = jnp.maximum(segment_ids - 1, 0)
    place = jnp.cumsum(scored, axis=1) - jnp.take_along_axis(starts, document, axis=1)  # 1 at the first scored token
    return jnp.where(place <= jnp.take_along_axis(shared, document, axis=1), 1.0, beyond)
