"""How far apart two models are in the next token, over the whole vocabulary, without the logits of either at once.

Both heads are used in the same pieces (`parts`), so that of each a block of logits is held; those of the backward pass
are computed again. The models may differ in all but their vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.objectives import parts
from ftjax.objectives.head import Head, Unembed
from ftjax.objectives.parts import LOWEST, Chunks, HeadSplit


class Between(NamedTuple):
    """What is compared, and how: logits of the policy and of the other model, and beta of `divergence_per_token`."""

    unembed: Unembed
    their_unembed: Unembed
    beta: float


class Sums(NamedTuple):
    """Of each token, over the columns so far, float32; relative to the highest yet, as in `cross_entropy.Sums`."""

    highest: jax.Array
    exponentials: jax.Array  # sum of exp(logit - highest)
    moments: jax.Array  # sum of exp(logit - highest) (logit - highest)
    their_highest: jax.Array  # of the other model, as the following
    their_exponentials: jax.Array
    differences: jax.Array  # sum of exp(their logit - their highest) (their logit - logit)


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
    """sum over v of p(v) log(p(v) / q(v)), float32 [B, T] in nats: `divergence_per_token` with beta 0, of one model
    with two sets of variables.
    """
    how = Between(unembed, unembed, 0.0)
    return divergence_per_token(how, chunks, head, hidden, their_head, their_hidden, wanted, rng)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def divergence_per_token(
    how: Between,
    chunks: Chunks | None,
    head: Head,
    hidden: jax.Array,
    their_head: Head,
    their_hidden: jax.Array,
    wanted: jax.Array,
    rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(divergence, entropy of q), float32 [B, T] in nats, of the positions that are `wanted`; others have 0.

    q is of head {path: array} and hidden [B, T, D], p of their_head and their_hidden [B, T, D'], which has no gradient;
    wanted bool [B, T]; rng: for the dropout of an adapter on the policy's head, or None. The divergence alone has a
    gradient.

    The divergence is the generalized Jensen-Shannon divergence of Agarwal et al. 2023 (arXiv 2306.13649), equation 1:
    beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q a mixture of probabilities. That vanishes as beta
    goes to 0 and 1, as beta KL(p || q) and (1 - beta) KL(q || p); so beta 0 stands for KL(p || q), the forward one, and
    1 for KL(q || p), as in TRL.
    """
    return _forward_pass(how, chunks, head, hidden, their_head, their_hidden, wanted, rng)[0]


def _forward_pass(how, chunks, head, hidden, their_head, their_hidden, wanted, rng):
    """(what `divergence_per_token` returns, what its backward pass needs)"""
    given = (head, hidden, their_head, their_hidden, wanted, rng)
    mesh, split, specs, by_token = parts.placed(head, hidden)
    _, their_split, their_specs, _ = parts.placed(their_head, hidden)
    local = functools.partial(_forward, how, chunks, split, their_split)
    if mesh is not None:
        inputs = (specs, by_token(3), their_specs, by_token(3), by_token(2), P(), by_token(2))
        local = jax.shard_map(local, in_specs=inputs, out_specs=(by_token(2),) * 5, check_vma=False)
    value, entropy, *of_tokens = local(*given, parts.token_index(hidden))
    return (value, entropy), (*given, *of_tokens)


def _backward_pass(how, chunks, saved, gradients):
    """gradients: float32 [B, T] of what `divergence_per_token` returns, of which the first counts."""
    head, hidden, their_head, *_ = saved
    mesh, split, specs, by_token = parts.placed(head, hidden)
    _, their_split, their_specs, _ = parts.placed(their_head, hidden)
    local = functools.partial(_backward, how, chunks, split, their_split)
    if mesh is not None:
        inputs = (specs, by_token(3), their_specs, by_token(3), by_token(2), P(), *(by_token(2),) * 5)
        local = jax.shard_map(local, in_specs=inputs, out_specs=(specs, by_token(3)), check_vma=False)
    d_head, d_hidden = local(*saved, gradients[0], parts.token_index(hidden))
    return d_head, d_hidden, None, None, None, None


divergence_per_token.defvjp(_forward_pass, _backward_pass)


def _cut(chunks: Chunks | None, hidden: jax.Array, head: Head, split: HeadSplit, their_split: HeadSplit) -> Chunks:
    split = split._replace(width=split.width or their_split.width)  # columns are gathered where either head's are
    cut = parts.cut(chunks, hidden, head, split)
    return cut if chunks else cut._replace(tokens=max(cut.tokens // 2, 1))  # there are two logits of each


def _forward(how, chunks, split, their_split, head, hidden, their_head, their_hidden, wanted, rng, token_index):
    """This device's divergence, entropy, the logs of both sums of exponentials, and what `_slope` needs beside them,
    float32 [B, T] each. Arguments as of `divergence_per_token`, of its own tokens and its part of the heads;
    token_index: see `parts.token_index`.
    """
    cut = _cut(chunks, hidden, head, split, their_split)
    order, real = parts.blocks(wanted, cut.tokens)
    rows, their_rows = (x.reshape(-1, x.shape[-1]) for x in (hidden, their_hidden))
    token_index = token_index.reshape(-1)

    def over_blocks(add, sums, *by_block):
        """`sums` of all columns: `add` is told the logits of both and what `by_block` has, of a block of tokens."""

        def over_columns(sums, chunk):
            start, fresh = chunk
            part = parts.part(head, cut.columns, start, split, hidden.dtype)
            their_part = parts.part(their_head, cut.columns, start, their_split, their_hidden.dtype)
            is_fresh = start + jnp.arange(cut.columns) >= fresh

            def with_logits(sums, positions, *others):
                indices = token_index[positions]
                ours = jnp.where(is_fresh, how.unembed(part, rows[positions], rng, indices), LOWEST)
                theirs = jnp.where(
                    is_fresh, how.their_unembed(their_part, their_rows[positions], None, indices), LOWEST
                )
                return add(sums, ours, theirs, *others)

            def over_tokens(_, block):
                sums, there, *others = block
                return None, jax.lax.cond(jnp.any(there), with_logits, lambda sums, *_: sums, sums, *others)

            return jax.lax.scan(over_tokens, None, (sums, real, order, *by_block))[1], None

        return jax.lax.scan(over_columns, sums, parts.starts(head, cut.columns))[0]

    def add(sums, ours, theirs):
        highest = jnp.maximum(sums.highest, ours.max(-1))
        their_highest = jnp.maximum(sums.their_highest, theirs.max(-1))
        shifted, weights = ours - highest[:, None], jnp.exp(theirs - their_highest[:, None])
        moved = sums.highest - highest
        scale, their_scale = jnp.exp(moved), jnp.exp(sums.their_highest - their_highest)
        return Sums(
            highest,
            sums.exponentials * scale + jnp.exp(shifted).sum(-1),
            (sums.moments + moved * sums.exponentials) * scale + _sum(jnp.exp(shifted), shifted),
            their_highest,
            sums.their_exponentials * their_scale + weights.sum(-1),
            sums.differences * their_scale + _sum(weights, theirs - ours),
        )

    zeros = jnp.zeros(order.shape, jnp.float32)
    sums = over_blocks(add, Sums(zeros + LOWEST, zeros, zeros, zeros + LOWEST, zeros, zeros))
    sums = _over_vocabulary(sums, split)
    exponentials = jnp.where(real, sums.exponentials, 1)
    log_norms = sums.highest + jnp.log(exponentials)
    their_exponentials = jnp.where(real, sums.their_exponentials, 1)
    their_log_norms = sums.their_highest + jnp.log(their_exponentials)
    # As in `cross_entropy`: of probabilities q = exp(l - m) / s it is log s - sum (exp(l - m) (l - m)) / s.
    entropy = jnp.log(exponentials) - sums.moments / exponentials
    if how.beta == 0:
        value = sums.differences / their_exponentials - their_log_norms + log_norms
        from_mixture = zeros
    else:
        # A mixture of probabilities is known when both sums are: the logits are computed once more.
        def add_mixed(sums, ours, theirs, log_norm, their_log_norm):
            ours, theirs = ours - log_norm[:, None], theirs - their_log_norm[:, None]
            mixed = _log_mixture(how.beta, ours, theirs)
            return tuple(old + _sum(jnp.exp(one), one - mixed) for old, one in zip(sums, (ours, theirs)))

        from_mixture, theirs_from = over_blocks(add_mixed, (zeros, zeros), log_norms, their_log_norms)
        if split.vocabulary:
            from_mixture, theirs_from = (jax.lax.psum(x, split.vocabulary) for x in (from_mixture, theirs_from))
        value = from_mixture if how.beta == 1 else how.beta * theirs_from + (1 - how.beta) * from_mixture
    out = (jnp.where(real, x, 0) for x in (value, entropy, log_norms, their_log_norms, from_mixture))
    return tuple(parts.back(x, order, real, wanted) for x in out)


def _log_mixture(beta: float, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """log(beta p + (1 - beta) q) of log q, `ours`, and log p, `theirs`; beta is above 0."""
    return theirs if beta == 1 else jnp.logaddexp(ours + jnp.log1p(-beta), theirs + jnp.log(beta))


def _slope(beta: float, ours: jax.Array, theirs: jax.Array, from_mixture: jax.Array) -> jax.Array:
    """d divergence / d logits of the policy, of log q and log p [tokens, columns] and KL(q || m) [tokens].

    With respect to q it is (1 - beta) log(q / m), whatever m's own change; through the softmax that less its mean.
    """
    if beta == 0:
        return jnp.exp(ours) - jnp.exp(theirs)
    share = 1 if beta == 1 else 1 - beta
    return share * jnp.exp(ours) * (ours - _log_mixture(beta, ours, theirs) - from_mixture[:, None])


def _sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[tokens]: sum of weights x values [tokens, n] over n, weights of at most 1."""
    # A choice that changes nothing, as in `cross_entropy`.
    return jnp.where(weights > 2, 0, weights * values).sum(-1)


def _over_vocabulary(sums, split):
    """The sums over the devices that share columns, by the same rescaling as between chunks."""
    if not split.vocabulary:
        return sums
    highest, their_highest = (jax.lax.pmax(x, split.vocabulary) for x in (sums.highest, sums.their_highest))
    scale, their_scale = jnp.exp(sums.highest - highest), jnp.exp(sums.their_highest - their_highest)
    moments = sums.moments + (sums.highest - highest) * sums.exponentials
    ours = (jax.lax.psum(x * scale, split.vocabulary) for x in (sums.exponentials, moments))
    theirs = (jax.lax.psum(x * their_scale, split.vocabulary) for x in (sums.their_exponentials, sums.differences))
    return Sums(highest, *ours, their_highest, *theirs)


def _backward(how, chunks, split, their_split, head, hidden, their_head, their_hidden, wanted, rng, *by_token):
    """This device's gradients of its part of the head and of hidden, as `cross_entropy._backward`.

    by_token: the results of `_forward` from the third on, the gradient of the first, float32 [B, T], and token_index.
    """
    *by_token, token_index = by_token
    cut = _cut(chunks, hidden, head, split, their_split)
    order, real = parts.blocks(wanted, cut.tokens)
    width = hidden.shape[-1]
    rows, their_rows = (x.reshape(-1, x.shape[-1]) for x in (hidden, their_hidden))
    token_index = token_index.reshape(-1)
    fill = (-LOWEST, -LOWEST, 0, 0)  # as in `cross_entropy`: of tokens that are not wanted every probability is 0
    by_block = tuple(jnp.where(real, x.reshape(-1)[order], none) for x, none in zip(by_token, fill, strict=True))

    def over_columns(carry, chunk):
        d_head, d_rows = carry
        start, fresh = chunk
        part = parts.part(head, cut.columns, start, split, hidden.dtype)
        their_part = parts.part(their_head, cut.columns, start, their_split, their_hidden.dtype)
        is_fresh = start + jnp.arange(cut.columns) >= fresh

        def add(d_part, d_block, positions, log_norm, their_log_norm, from_mixture, gradient):
            indices = token_index[positions]
            logits, pull = jax.vjp(lambda part, rows: how.unembed(part, rows, rng, indices), part, rows[positions])
            theirs = how.their_unembed(their_part, their_rows[positions], None, indices) - their_log_norm[:, None]
            d_logits = _slope(how.beta, logits - log_norm[:, None], theirs, from_mixture)
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
