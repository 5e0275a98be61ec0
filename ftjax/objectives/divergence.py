"""KL(reference || policy) of the next token over the whole vocabulary, without the logits of either at once.

Both heads are used in the same pieces (`parts`), so that of each a block of logits is held; those of the backward pass
are computed again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.objectives import parts
from ftjax.objectives.head import Head, Unembed
from ftjax.objectives.parts import LOWEST, Chunks


class Sums(NamedTuple):
    """Of each token, over the columns so far, float32; relative to the highest yet, as in `cross_entropy.Sums`."""

    highest: jax.Array
    exponentials: jax.Array  # sum of exp(logit - highest)
    their_highest: jax.Array  # of the reference, as the following
    their_exponentials: jax.Array
    differences: jax.Array  # sum of exp(their logit - their highest) (their logit - logit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def kl_per_token(
    unembed: Unembed,
    chunks: Chunks | None,
    head: Head,
    hidden: jax.Array,
    their_head: Head,
    their_hidden: jax.Array,
    wanted: jax.Array,
    rng: jax.Array | None,
) -> jax.Array:
    """sum over v of p(v) log(p(v) / q(v)), float32 [B, T] in nats, of the positions that are `wanted`; others have 0.

    q is of head {path: array} and hidden [B, T, D], p of their_head and their_hidden, the reference, which has no
    gradient; wanted bool [B, T]; rng: for the dropout of an adapter on the policy's head, or None.
    """
    return _forward_pass(unembed, chunks, head, hidden, their_head, their_hidden, wanted, rng)[0]


def _forward_pass(unembed, chunks, head, hidden, their_head, their_hidden, wanted, rng):
    """(what `kl_per_token` returns, what its backward pass needs)"""
    given = (head, hidden, their_head, their_hidden, wanted, rng)
    mesh, split, specs, by_token = parts.placed(head, hidden)
    local = functools.partial(_forward, unembed, chunks, split)
    if mesh is not None:
        their_specs = parts.placed(their_head, hidden)[2]
        inputs = (specs, by_token(3), their_specs, by_token(3), by_token(2), P(), by_token(2))
        local = jax.shard_map(local, in_specs=inputs, out_specs=(by_token(2),) * 3, check_vma=False)
    kl, *log_norms = local(*given, parts.token_index(hidden))
    return kl, (*given, *log_norms)


def _backward_pass(unembed, chunks, saved, gradient):
    """gradient: float32 [B, T] of what `kl_per_token` returns."""
    head, hidden, their_head, *_ = saved
    mesh, split, specs, by_token = parts.placed(head, hidden)
    local = functools.partial(_backward, unembed, chunks, split)
    if mesh is not None:
        their_specs = parts.placed(their_head, hidden)[2]
        inputs = (specs, by_token(3), their_specs, by_token(3), by_token(2), P(), *(by_token(2),) * 4)
        local = jax.shard_map(local, in_specs=inputs, out_specs=(specs, by_token(3)), check_vma=False)
    d_head, d_hidden = local(*saved, gradient, parts.token_index(hidden))
    return d_head, d_hidden, None, None, None, None


kl_per_token.defvjp(_forward_pass, _backward_pass)


def _cut(chunks, hidden, head, split):
    cut = parts.cut(chunks, hidden, head, split)
    return cut if chunks else cut._replace(tokens=max(cut.tokens // 2, 1))  # there are two logits of each


def _forward(unembed, chunks, split, head, hidden, their_head, their_hidden, wanted, rng, token_index):
    """This device's KL and the logs of both sums of exponentials, float32 [B, T] each. Arguments as of `kl_per_token`,
    of its own tokens and its part of the heads; token_index: see `parts.token_index`.
    """
    cut = _cut(chunks, hidden, head, split)
    order, real = parts.blocks(wanted, cut.tokens)
    rows, their_rows = (x.reshape(-1, x.shape[-1]) for x in (hidden, their_hidden))
    token_index = token_index.reshape(-1)

    def over_columns(sums, chunk):
        start, fresh = chunk
        part, their_part = (parts.part(one, cut.columns, start, split, hidden.dtype) for one in (head, their_head))
        is_fresh = start + jnp.arange(cut.columns) >= fresh

        def add(sums, positions):
            indices = token_index[positions]
            ours = jnp.where(is_fresh, unembed(part, rows[positions], rng, indices), LOWEST)
            theirs = jnp.where(is_fresh, unembed(their_part, their_rows[positions], None, indices), LOWEST)
            highest = jnp.maximum(sums.highest, ours.max(-1))
            their_highest = jnp.maximum(sums.their_highest, theirs.max(-1))
            weights = jnp.exp(theirs - their_highest[:, None])
            their_scale = jnp.exp(sums.their_highest - their_highest)
            return Sums(
                highest,
                sums.exponentials * jnp.exp(sums.highest - highest) + jnp.exp(ours - highest[:, None]).sum(-1),
                their_highest,
                sums.their_exponentials * their_scale + weights.sum(-1),
                sums.differences * their_scale + (weights * (theirs - ours)).sum(-1),
            )

        def over_tokens(_, block):
            sums, positions, there = block
            return None, jax.lax.cond(jnp.any(there), add, lambda sums, _: sums, sums, positions)

        return jax.lax.scan(over_tokens, None, (sums, order, real))[1], None

    zeros = jnp.zeros(order.shape, jnp.float32)
    first = Sums(zeros + LOWEST, zeros, zeros + LOWEST, zeros, zeros)
    sums, _ = jax.lax.scan(over_columns, first, parts.starts(head, cut.columns))
    sums = _over_vocabulary(sums, split)
    log_norms = sums.highest + jnp.log(jnp.where(real, sums.exponentials, 1))
    their_exponentials = jnp.where(real, sums.their_exponentials, 1)
    their_log_norms = sums.their_highest + jnp.log(their_exponentials)
    kl = jnp.where(real, sums.differences / their_exponentials - their_log_norms + log_norms, 0)
    return tuple(parts.back(x, order, real, wanted) for x in (kl, log_norms, their_log_norms))


def _over_vocabulary(sums, split):
    """The sums over the devices that share columns, by the same rescaling as between chunks."""
    if not split.vocabulary:
        return sums
    highest, their_highest = (jax.lax.pmax(x, split.vocabulary) for x in (sums.highest, sums.their_highest))
    scale, their_scale = jnp.exp(sums.highest - highest), jnp.exp(sums.their_highest - their_highest)
    scaled = (sums.exponentials * scale, sums.their_exponentials * their_scale, sums.differences * their_scale)
    exponentials, their_exponentials, differences = (jax.lax.psum(x, split.vocabulary) for x in scaled)
    return Sums(highest, exponentials, their_highest, their_exponentials, differences)


def _backward(unembed, chunks, split, head, hidden, their_head, their_hidden, wanted, rng, *by_token):
    """This device's gradients of its part of the head and of hidden, as `cross_entropy._backward`.

    by_token: the second and third result of `_forward`, the gradient of the first, float32 [B, T], and token_index.
    """
    *by_token, token_index = by_token
    cut = _cut(chunks, hidden, head, split)
    order, real = parts.blocks(wanted, cut.tokens)
    width = hidden.shape[-1]
    rows, their_rows, token_index = hidden.reshape(-1, width), their_hidden.reshape(-1, width), token_index.reshape(-1)
    fill = (-LOWEST, -LOWEST, 0)  # as in `cross_entropy`: of tokens that are not wanted every probability is 0
    by_block = tuple(jnp.where(real, x.reshape(-1)[order], none) for x, none in zip(by_token, fill, strict=True))

    def over_columns(carry, chunk):
        d_head, d_rows = carry
        start, fresh = chunk
        part, their_part = (parts.part(one, cut.columns, start, split, hidden.dtype) for one in (head, their_head))
        is_fresh = start + jnp.arange(cut.columns) >= fresh

        def add(d_part, d_block, positions, log_norm, their_log_norm, gradient):
            indices = token_index[positions]
            logits, pull = jax.vjp(lambda part, rows: unembed(part, rows, rng, indices), part, rows[positions])
            wanted = unembed(their_part, their_rows[positions], None, indices)
            # d KL / d logits is the policy's softmax less the reference's.
            d_logits = jnp.exp(logits - log_norm[:, None]) - jnp.exp(wanted - their_log_norm[:, None])
            of_part, of_rows = pull(jnp.where(is_fresh, d_logits * gradient[:, None], 0))
            d_part = jax.tree.map(lambda total, new: total + new.astype(total.dtype), d_part, of_part)
            return d_part, d_block + of_rows.astype(jnp.float32)

        def over_tokens(d_part, block):
            d_block, there, *others = block
            skip = lambda d_part, d_block, *_: (d_part, d_block)  # noqa: E731
            return jax.lax.cond(jnp.any(there), add, skip, d_part, d_block, *others)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), part)
        d_part, d_rows = jax.lax.scan(over_tokens, zeros, (d_rows, real, order, *by_block))
        return (parts.add_part(d_head, d_part, start, split, hidden.dtype), d_rows), None

    d_head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    d_rows = jnp.zeros((*order.shape, width), jnp.float32)
    (d_head, d_rows), _ = jax.lax.scan(over_columns, (d_head, d_rows), parts.starts(head, cut.columns))
    if split.vocabulary:
        d_rows = jax.lax.psum(d_rows, split.vocabulary)
    d_head = {path: parts.of_shared(path, leaf, split).astype(head[path].dtype) for path, leaf in d_head.items()}
    return d_head, parts.back(d_rows, order, real, wanted).astype(hidden.dtype)
