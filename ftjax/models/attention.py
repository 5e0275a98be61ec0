"""Causal grouped-query attention over packed, padded or cached sequences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a query with nothing to attend to (padding) yields a mean instead of NaN.
MASKED = -1e30

BLOCK = 64  # queries at a time: few enough for the scores to stay in a CPU's caches
PARTS = 4  # of a row, of which each sees those before it and itself; each is compiled on its own


class Shared(NamedTuple):
    """Where tokens lie in rows of documents that share what they begin with, int32; see `seen_until`."""

    queries: jax.Array  # [T], the place of each query in its row
    keys: jax.Array  # [S], of each key
    until: jax.Array  # [B, S], of the first token after each key that does not see it


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    last: jax.Array | None = None,
    shared: Shared | None = None,
) -> jax.Array:
    """Softmax attention, Ainslie et al. 2023 grouping; softmax in float32.

    queries [B, T, H, d]; keys [B, S, K, d] with K dividing H; values [B, S, K, e]; positions and segments int32 [B, T]
    or [B, S].
    A token sees the tokens of its own segment at its own and earlier positions, the last `window` of them if given.
    softcap: scores s become softcap * tanh(s / softcap) (Gemma 2). sinks [H]: one more score per head in the softmax's
    denominator (GPT-OSS). last int32 [B, T]: a token sees up to this position, which may be a later one than its own
    (Gemma 3's images). shared: documents may see others' tokens, too. Returns [B, T, H, e] in queries' dtype.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    # The heads of a group are rows of one matrix product against their shared keys. Batch dimensions stand in front:
    # XLA on CPUs is several times slower with them elsewhere.
    grouped = queries.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim) * jnp.asarray(scale, queries.dtype)
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkxd,bksd->bkxs", grouped, keys, preferred_element_type=jnp.float32)
    seen = sees(query_positions, key_positions, query_segments, key_segments, window, last, shared)
    weights = _weights(scores, seen, softcap, sinks).astype(values.dtype)
    out = jnp.einsum("bkxs,bksd->bkxd", weights, values).reshape(batch, kv_heads, -1, length, values.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def attention_of_rows(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    last: jax.Array | None = None,
    ahead: int = 0,
    until: jax.Array | None = None,
) -> jax.Array:
    """`attention` of whole rows, a block of queries at a time.

    Shapes as there, with S = T; the tokens of a segment lie one after the other. So a block needs no keys after its own
    last token (but for `ahead`, by which `last` is beyond it at most), and where all layers have one window none before
    it either: half of the products of long rows. The backward pass makes a block's scores again instead of keeping
    those of all blocks [B, H, T, T] (Dao et al. 2022, section 3), which on CPUs is faster too, as they stay in the
    cache: half of the time for rows of 1,024 tokens.

    until: int32 [B, T], where documents share what they begin with: `seen_until`.
    """
    length = queries.shape[1]
    parts, blocks, block = cut(length)
    index = jnp.arange(length, dtype=jnp.int32)
    if parts == 1:
        places = (*2 * (positions,), *2 * (segment_ids,))
        shared = None if until is None else Shared(index, index, until)
        return attention(queries, keys, values, *places, scale, window, softcap, sinks, last, shared)

    def of_part(start: int) -> jax.Array:
        stop = start + blocks * block
        near = isinstance(window, int) and until is None  # what is shared may lie further before than its positions say
        first = max(start - window + 1, 0) if near else 0
        end = stop + ahead
        seen_positions, seen_segments = positions[:, first:end], segment_ids[:, first:end]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_block(own, seen):
            queries, positions, segments, last, places = own
            its = (positions, seen_positions, segments, seen_segments)
            shared = None if until is None else Shared(places[0], index[first:end], until[:, first:end])
            return attention(queries, *seen, *its, scale, window, softcap, sinks, last, shared)

        def blocked(x):  # [B, T, ...] -> [blocks, B, block, ...]
            x = x[:, start:stop]
            x = jnp.pad(x, [(0, 0), (0, stop - start - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], blocks, block, *x.shape[2:]).swapaxes(0, 1)

        seen = keys[:, first:end], values[:, first:end]
        own = (queries, positions, segment_ids, last, None if until is None else index[None])
        out = jax.lax.map(lambda own: of_block(own, seen), jax.tree.map(blocked, own))
        return out.swapaxes(0, 1).reshape(queries.shape[0], -1, *out.shape[3:])

    return jnp.concatenate([of_part(i * blocks * block) for i in range(parts)], axis=1)[:, :length]


def cut(length: int) -> tuple[int, int, int]:
    """(parts of a row of `length` tokens, blocks of a part, tokens of a block, the row's last one padded)"""
    parts = min(PARTS, -(-length // BLOCK))
    blocks = -(-length // (parts * BLOCK))
    return parts, blocks, -(-length // (parts * blocks))


def attention_after(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cached_keys: jax.Array,
    cached_values: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    last: jax.Array | None = None,
) -> jax.Array:
    """The same for tokens that go on after those of a cache, of which they see the slots before the first of them.

    queries [B, T, H, d]; keys [B, K, T, d], values [B, K, T, e] of these tokens; cached_* [B, K, S, d or e], the token
    of position p in slot p; positions, segment_ids int32 [B, T]; window also [B, T, 1], each query its own. The cache
    is only read, in its own order, so that nothing of it is copied. Returns [B, T, H, e].
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads, slots = keys.shape[1], jnp.arange(cached_keys.shape[2])
    grouped = queries.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim) * jnp.asarray(scale, queries.dtype)
    scores = [
        jnp.einsum("bkxd,bksd->bkxs", grouped, seen, preferred_element_type=jnp.float32) for seen in (cached_keys, keys)
    ]
    before = jnp.broadcast_to(slots < positions[:, :1, None], (*positions.shape, len(slots)))
    if window is not None:
        before &= positions[:, :, None] - slots < window
    own = sees(positions, positions, segment_ids, segment_ids, window, last)
    seen = jnp.concatenate([before, own], axis=-1)
    weights = _weights(jnp.concatenate(scores, axis=-1), seen, softcap, sinks).astype(values.dtype)
    parts = jnp.split(weights, [len(slots)], axis=-1)
    out = sum(jnp.einsum("bkxs,bksd->bkxd", part, its) for part, its in zip(parts, (cached_values, values)))
    out = out.reshape(batch, kv_heads, -1, length, values.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _weights(scores: jax.Array, seen: jax.Array, softcap: float | None, sinks: jax.Array | None) -> jax.Array:
    """The softmax over keys: scores [B, K, G T, S] of G heads that share keys, seen bool [B, T, S] -> as scores."""
    batch, kv_heads, _, keys = scores.shape
    scores = scores.reshape(batch, kv_heads, -1, seen.shape[1], keys)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        largest = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
        weights = jnp.exp(scores - largest)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest))
    return weights.reshape(batch, kv_heads, -1, keys)


def chunk_segments(positions: jax.Array, segment_ids: jax.Array, chunk: int | jax.Array) -> jax.Array:
    """Segment ids int32 [B, T] of rows in which each `chunk` positions of a segment are a segment of their own.

    positions, segment_ids int32 [B, T], the tokens of a segment one after the other; padding (0) stays what it is.
    """
    numbers = positions // chunk
    begins = (numbers[:, 1:] != numbers[:, :-1]) | (segment_ids[:, 1:] != segment_ids[:, :-1])
    counted = 1 + jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids > 0, counted, 0)


def sees(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int | jax.Array | None,
    last: jax.Array | None = None,
    shared: Shared | None = None,
) -> jax.Array:
    """bool [B, T, S]: which keys each query sees."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    if shared is not None:
        places = shared.queries[None, :, None]
        seen = (shared.keys[None, None] <= places) & (places < shared.until[:, None])
    else:
        is_before = distance >= 0 if last is None else key_positions[:, None, :] <= last[:, :, None]
        seen = (query_segments[:, :, None] == key_segments[:, None, :]) & is_before
    return seen if window is None else seen & (distance < window)


def seen_until(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """int32 [B, T]: where in its row the first token after each lies that does not see it; T where all see it.

    positions, segment_ids: int32 [B, T], of rows whose documents share what they begin with. One that begins at
    position p sees, as if they were its own, the tokens at positions below p that the token before it sees or is:
    so it hides all others from what comes after it. Hence one number for each key says all
    (FlashMask, Wang et al. 2024, arXiv 2410.01359, section 4.1).
    """
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def of_block(block):  # a few keys at a time: of all of them [B, T, T] numbers would be held
        places, own = block
        hides = begins[:, None, :] & (positions[:, None, :] <= own[:, :, None]) & (index > places[:, None])
        return jnp.min(jnp.where(hides, index, len(index)), axis=-1)

    batch, length = positions.shape
    fill = -length % BLOCK
    places = jnp.pad(index, (0, fill)).reshape(-1, BLOCK)
    own = jnp.pad(positions, ((0, 0), (0, fill))).reshape(batch, -1, BLOCK).swapaxes(0, 1)
    return jax.lax.map(of_block, (places, own)).swapaxes(0, 1).reshape(batch, -1)[:, :length]
