"""Next-token cross-entropy that holds the logits of a few tokens and a part of the vocabulary at a time.

Each device holds at most BLOCK logits, or where the head is not split those of some tokens (`parts`), whatever the
batch and the number of devices, and the whole head crosses the network once forward and once backward, its gradient
once. The logits of the backward pass are computed again, but not where the head is frozen, as it is under most
adapters, and a device has all of its columns: then hidden's gradient is made of the logits while they are there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from ftjax.objectives import parts
from ftjax.objectives.head import Head, Unembed
from ftjax.objectives.parts import LOWEST, Chunks, HeadSplit


class Further(NamedTuple):
    """What the loss of a token has beside -log p(target), and what else is wanted of it."""

    # e: (1 - e) and e of the mean of -log p over the vocabulary (Szegedy et al. 2016)
    label_smoothing: float = 0.0
    # z: z log(Z)^2 more, which holds the normalizer Z of the softmax near 1 (Chowdhery et al. 2022, section 5)
    z_loss: float = 0.0
    squares: bool = False  # also `PerToken.log_squares`


PLAIN = Further()


class PerToken(NamedTuple):
    """Float32 [B, T] each; 0 at positions that were not wanted. The loss alone has a gradient."""

    loss: jax.Array
    correct: jax.Array  # 1 where no token is likelier than the target
    entropy: jax.Array
    nll: jax.Array  # -log p(target)
    log_squares: jax.Array | None  # log of the sum of p^2 over the vocabulary, where `Further.squares` asks for it


class Sums(NamedTuple):
    """Of each token, over the columns so far: [blocks, tokens] each, of one block [tokens]; float32.

    The softmax over columns that come one chunk after another (Milakov and Gimelshein 2018): sums are relative to the
    highest logit yet, and rescaled when a higher one comes, so that no exponential overflows.
    """

    highest: jax.Array
    exponentials: jax.Array  # sum of exp(logit - highest)
    moments: jax.Array  # sum of exp(logit - highest) * (logit - highest)
    target: jax.Array  # the target's logit, LOWEST before it was met
    logits: jax.Array  # sum of them, where labels are smoothed
    squares: jax.Array  # sum of exp(logit - highest)^2, where they are wanted


def cross_entropy(
    unembed: Unembed,
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    rng: jax.Array | None = None,
    chunks: Chunks | None = None,
    further: Further = PLAIN,
) -> dict[str, jax.Array]:
    """Weighted sums of loss, correct predictions and entropy over all positions, and of -log p(target) alone.

    unembed: see head.py, its logits float32 [n, columns] of some columns of `head`; hidden [B, T, D]; targets
    int32 [B, T]; weights float32 [B, T], 0 where a position is not trained on. rng: for the dropout of an adapter on
    the head. Returns float32 scalars `loss`, `correct`, `entropy`, `nll`; the loss alone has a gradient, with respect
    to hidden and head.
    """
    hidden, targets, weights = map(jnp.asarray, (hidden, targets, weights))
    found = per_token(unembed, chunks, further, head, hidden, targets, weights != 0, rng)
    return {name: jnp.sum(getattr(found, name) * weights) for name in ("loss", "correct", "entropy", "nll")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def per_token(
    unembed: Unembed,
    chunks: Chunks | None,
    further: Further,
    head: Head,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    rng: jax.Array | None,
) -> PerToken:
    """What is said of each position that is `wanted`.

    head {path: array}; hidden [B, T, D]; targets int32 [B, T]; wanted bool [B, T]; rng a PRNG key or None.

    The gradient is written out, because JAX's own would keep the logits of every chunk. What is kept is the log of the
    sum of exponentials [B, T], from which a chunk's probabilities follow alone, or where `_at_once` the gradient
    [B, T, D] itself, in the place of hidden.
    """
    return _made(unembed, chunks, further, head, hidden, targets, wanted, rng, False)[0]


def _per_token_forward(unembed, chunks, further, *arguments):
    """(what `per_token` returns, what its backward pass needs); arguments: those of `per_token`, each array with
    whether it has a gradient.
    """
    head, hidden, *others = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=_is_primal)
    frozen = not any(leaf.perturbed for leaf in jax.tree.leaves(arguments[0], is_leaf=_is_primal))
    at_once = frozen and _at_once(chunks, head, hidden)
    out, log_norms, d_hidden = _made(unembed, chunks, further, head, hidden, *others, at_once)
    return out, (None, d_hidden) if at_once else ((head, hidden, *others, log_norms), None)


def _is_primal(leaf):
    return hasattr(leaf, "perturbed")


def _at_once(chunks: Chunks | None, head: Head, hidden: jax.Array) -> bool:
    """Whether each device has all logits of a token at a time: hidden's gradient can be made of them then."""
    _, split, *_ = parts.placed(head, hidden)
    columns = parts.columns_of(head)
    return not split.width and not split.vocabulary and (chunks is None or chunks.columns >= columns)


def _made(unembed, chunks, further, head, hidden, targets, wanted, rng, at_once):
    """(`PerToken`, log of the sum of exponentials float32 [B, T], if `at_once` the gradient of the sum of all losses
    with respect to hidden [B, T, D], else None), of all devices.
    """
    mesh, split, specs, by_token = parts.placed(head, hidden)

    def local(head, hidden, targets, wanted, rng, token_index):
        cut = parts.cut(chunks, hidden, head, split)
        return _forward(unembed, cut, further, split, head, hidden, targets, wanted, rng, token_index, at_once)

    if mesh is not None:
        inputs = (specs, by_token(3), *(by_token(2),) * 2, P(), by_token(2))
        out = (by_token(2), by_token(2), by_token(3))
        local = jax.shard_map(local, in_specs=inputs, out_specs=out, check_vma=False)
    return local(head, hidden, targets, wanted, rng, parts.token_index(hidden))


def _per_token_backward(unembed, chunks, further, saved, gradients):
    """gradients: `PerToken` of what `per_token` returns, of which that of the loss alone counts. Returns one for each
    argument of `per_token` that can have one, None for the others.
    """
    again, d_hidden = saved
    # The others are metrics: their gradients are dropped, and so no loss may be made of them.
    gradient = gradients.loss
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    if again is None:  # a token's loss changes by its own hidden state alone, so its gradient is a factor
        return None, (d_hidden * gradient[..., None]).astype(d_hidden.dtype), None, None, None
    head, hidden, *_ = again
    mesh, split, specs, by_token = parts.placed(head, hidden)

    def local(head, hidden, targets, wanted, rng, log_norms, gradient, token_index):
        cut = parts.cut(chunks, hidden, head, split)
        its = (head, hidden, targets, wanted, rng, log_norms, gradient, token_index)
        return _backward(unembed, cut, further, split, *its)

    if mesh is not None:
        inputs = (specs, by_token(3), *(by_token(2),) * 2, P(), *(by_token(2),) * 3)
        local = jax.shard_map(local, in_specs=inputs, out_specs=(specs, by_token(3)), check_vma=False)
    d_head, d_hidden = local(*again, gradient, parts.token_index(hidden))
    return d_head, d_hidden, None, None, None


per_token.defvjp(_per_token_forward, _per_token_backward, symbolic_zeros=True)


def _forward(unembed, cut, further, split, head, hidden, targets, wanted, rng, token_index, at_once):
    """This device's (`PerToken`, log of the sum of exponentials float32 [B, T], None or the gradient of hidden).

    cut: Chunks; further: Further; split: HeadSplit; head: this device's part; hidden [B, T, D], targets int32 [B, T],
    wanted bool [B, T] and token_index int32 [B, T], of its own tokens; rng as in `per_token`; at_once: whether the
    gradient is wanted. There is one chunk then.
    """
    order, real = parts.blocks(wanted, cut.tokens)
    rows, token_index = hidden.reshape(-1, hidden.shape[-1]), token_index.reshape(-1)
    targets = targets.reshape(-1)[order] - parts.first_column(head, split)

    def over_columns(sums, chunk):
        start, fresh = chunk
        part = parts.part(head, cut.columns, start, split, hidden.dtype)
        ids = start + jnp.arange(cut.columns)

        def add(sums, positions, target):
            """sums of one block; positions and target int32 [tokens]"""
            made = lambda rows: unembed(part, rows, rng, token_index[positions])  # noqa: E731
            logits, pull = jax.vjp(made, rows[positions]) if at_once else (made(rows[positions]), None)
            logits = jnp.where(ids >= fresh, logits, LOWEST)
            # The value alone: XLA for CPUs takes 25 times as long for the place of the highest logit.
            highest = jnp.maximum(sums.highest, logits.max(axis=-1))
            shifted = logits - highest[:, None]
            exponentials = jnp.exp(shifted)
            # A choice that changes nothing: XLA for CPUs takes five times as long for a bare sum of products.
            products = jnp.where(shifted > 0, 0, exponentials * shifted)
            moved = sums.highest - highest  # 0, or negative where this chunk has a higher logit
            scale = jnp.exp(moved)
            column = jnp.clip(target - start, 0, cut.columns - 1)
            target_logit = jnp.take_along_axis(logits, column[:, None], axis=-1)[:, 0]
            met = (target >= fresh) & (target < start + cut.columns)
            new = Sums(
                highest,
                sums.exponentials * scale + exponentials.sum(axis=-1),
                # sum of e (l - m') where m' = m - moved: each old term e (l - m) gains e moved, then all are rescaled.
                (sums.moments + moved * sums.exponentials) * scale + products.sum(axis=-1),
                jnp.where(met, target_logit, sums.target),
                sums.logits + jnp.where(ids >= fresh, logits, 0).sum(-1) if further.label_smoothing else sums.logits,
                sums.squares * scale**2 + jnp.sum(exponentials**2, axis=-1) if further.squares else sums.squares,
            )
            if not at_once:
                return new, None
            log_norm = highest + jnp.log(new.exponentials)
            (d_block,) = pull(_of_logits(further, logits, log_norm, ids == target[:, None], ids.size))
            return new, d_block

        def skip(sums, positions, target):
            return sums, jnp.zeros((*positions.shape, rows.shape[-1]), rows.dtype) if at_once else None

        def over_tokens(_, block):
            sums, positions, target, there = block
            # A conditional, not a mask: a block without a wanted token costs no product.
            return None, jax.lax.cond(jnp.any(there), add, skip, sums, positions, target)

        return jax.lax.scan(over_tokens, None, (sums, order, targets, real))[1]

    # Columns outside, tokens inside: a chunk of a split head is gathered once, not once for each block.
    zeros = jnp.zeros(order.shape, jnp.float32)
    first = Sums(zeros + LOWEST, zeros, zeros, zeros + LOWEST, zeros, zeros)
    sums, d_rows = jax.lax.scan(over_columns, first, parts.starts(head, cut.columns))
    highest, exponentials, moments, target, logits, squares = _over_vocabulary(sums, split)
    log_norms = highest + jnp.log(jnp.where(real, exponentials, 1))
    # Of probabilities p = exp(l - m) / s: -sum p log p = log s - sum (exp(l - m) (l - m)) / s.
    entropy = jnp.log(jnp.where(real, exponentials, 1)) - moments / jnp.where(real, exponentials, 1)
    loss = nll = log_norms - target
    if further.label_smoothing:
        loss = nll + further.label_smoothing * (target - logits / parts.all_columns(head, split))
    if further.z_loss:
        loss = loss + further.z_loss * log_norms**2
    # Of probabilities p = exp(l - m) / s: log sum p^2 = log sum exp(l - m)^2 - 2 log s.
    squares = jnp.log(jnp.where(real, squares, 1)) + 2 * (highest - log_norms) if further.squares else None
    out = PerToken(loss, (target == highest).astype(jnp.float32), entropy, nll, squares)
    out = jax.tree.map(lambda x: parts.back(jnp.where(real, x, 0), order, real, wanted), out)
    d_hidden = None
    if at_once:
        d_hidden = parts.back(jnp.where(real[..., None], d_rows[0], 0), order, real, wanted)
    return out, parts.back(log_norms, order, real, wanted), d_hidden


def _of_logits(further, logits, log_norm, is_target, columns):
    """The gradient of a token's loss with respect to its logits: the softmax less 1 at the target.

    logits float32 [tokens, n], log_norm float32 [tokens]; is_target bool [tokens, n]; columns: of the whole vocabulary.
    """
    probabilities, ideal = jnp.exp(logits - log_norm[:, None]), is_target
    if further.z_loss:  # d log(Z) / d logits is the softmax
        probabilities = probabilities * (1 + 2 * further.z_loss * log_norm[:, None])
    if further.label_smoothing:
        ideal = (1 - further.label_smoothing) * ideal + further.label_smoothing / columns
    return probabilities - ideal


def _over_vocabulary(sums: Sums, split: HeadSplit) -> Sums:
    """This device's sums, over all devices that share columns.

    The same rescaling as between chunks; a device whose columns lack the target has LOWEST there, which the maximum
    passes over.
    """
    if not split.vocabulary:
        return sums
    highest = jax.lax.pmax(sums.highest, split.vocabulary)
    moved = sums.highest - highest
    scale = jnp.exp(moved)
    exponentials = jax.lax.psum(sums.exponentials * scale, split.vocabulary)
    moments = jax.lax.psum((sums.moments + moved * sums.exponentials) * scale, split.vocabulary)
    target = jax.lax.pmax(sums.target, split.vocabulary)
    logits, squares = (jax.lax.psum(x, split.vocabulary) for x in (sums.logits, sums.squares * scale**2))
    return Sums(highest, exponentials, moments, target, logits, squares)


def _backward(unembed, cut, further, split, head, hidden, targets, wanted, rng, log_norms, gradient, token_index):
    """This device's (gradient of its part of the head, {path: array} in the head's dtypes, and of hidden [B, T, D]).

    As `_forward`, with log_norms, its second result, and gradient, that of the losses, float32 [B, T] both.
    """
    order, real = parts.blocks(wanted, cut.tokens)
    width = hidden.shape[-1]
    rows, token_index = hidden.reshape(-1, width), token_index.reshape(-1)
    targets = targets.reshape(-1)[order] - parts.first_column(head, split)
    # Of tokens that are not wanted any logit, high ones too, has the probability 0, and not infinity times their 0.
    log_norms = jnp.where(real, log_norms.reshape(-1)[order], -LOWEST)
    gradient = jnp.where(real, gradient.reshape(-1)[order], 0)

    def over_columns(carry, chunk):
        d_head, d_rows = carry
        start, fresh = chunk
        part = parts.part(head, cut.columns, start, split, hidden.dtype)
        ids = start + jnp.arange(cut.columns)

        def add(d_part, d_block, positions, target, log_norm, gradient):
            indices = token_index[positions]
            logits, pull = jax.vjp(lambda part, rows: unembed(part, rows, rng, indices), part, rows[positions])
            columns = parts.all_columns(head, split)
            d_logits = _of_logits(further, logits, log_norm, ids == target[:, None], columns) * gradient[:, None]
            d_logits = jnp.where(ids >= fresh, d_logits, 0)
            of_part, of_rows = pull(d_logits)
            add = lambda total, new: total + new.astype(total.dtype)  # noqa: E731
            return jax.tree.map(add, d_part, of_part), d_block + of_rows.astype(jnp.float32)

        def over_tokens(d_part, block):
            d_block, positions, target, log_norm, gradient, there = block
            skip = lambda d_part, d_block, *_: (d_part, d_block)  # noqa: E731
            return jax.lax.cond(jnp.any(there), add, skip, d_part, d_block, positions, target, log_norm, gradient)

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), part)
        blocks = (d_rows, order, targets, log_norms, gradient, real)
        d_part, d_rows = jax.lax.scan(over_tokens, zeros, blocks)
        return (parts.add_part(d_head, d_part, start, split, hidden.dtype), d_rows), None

    # In float32: of thousands of blocks that are summed, bfloat16 would round the later ones away.
    d_head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    d_rows = jnp.zeros((*order.shape, width), jnp.float32)
    (d_head, d_rows), _ = jax.lax.scan(over_columns, (d_head, d_rows), parts.starts(head, cut.columns))
    if split.vocabulary:  # each device had its own columns' share of what hidden is to change by
        d_rows = jax.lax.psum(d_rows, split.vocabulary)
    d_head = {path: parts.of_shared(path, leaf, split).astype(head[path].dtype) for path, leaf in d_head.items()}
    return d_head, parts.back(d_rows, order, real, wanted).astype(hidden.dtype)
