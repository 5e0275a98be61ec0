"""What a head says of documents: its numbers at the last token of each, wherever that stands in a row."""

import jax
import jax.numpy as jnp

from ftjax.models import heads
from ftjax.models.decoder import Decoder
from ftjax.models.heads import SCORE
from ftjax.tree import Tree

Batch = dict[str, jax.Array]


def scores(model: Decoder, variables: Tree, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """float32 [B, T, K]: what the head SCORE gives at every token; rng: for dropout, None without it."""
    rngs = None if rng is None else {"dropout": rng}
    hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
    return heads.values(variables, SCORE, hidden)


def is_last(segment_ids: jax.Array) -> jax.Array:
    """bool [B, T]: where a document ends. segment_ids: int32 [B, T], 0 for padding.

    No token is asked for its id: a padding token may be an end token too, and end tokens stand between turns.
    """
    following = jnp.pad(segment_ids[:, 1:], [(0, 0), (0, 1)])
    return (segment_ids > 0) & (segment_ids != following)
