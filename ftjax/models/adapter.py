"""What an adapter adds to a layer: LoRA (Hu et al. 2021), its dropout, and DoRA (Liu et al. 2024)."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ftjax.models import onednn


def adapt(
    lora: Mapping[str, jax.Array],
    x: jax.Array,
    y: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    kernel: Callable[[jnp.dtype], jax.Array],
    rng: jax.Array | None,
    token_index: jax.Array | None = None,
) -> jax.Array:
    """x [..., in], y = x W [..., out] -> y + scale (x A) B; x W and W are to be had from `product(x)`, `kernel(dtype)`.

    lora: `lora_a` [in, r], `lora_b` [r, out], `lora_scale` scalar; with DoRA `lora_magnitude` [out], the norms that the
    columns of W + scale A B are given; with dropout `lora_dropout`, a scalar rate that counts where there is an rng.
    With `lora_row`, int32 [rows], each row of x [rows, ..., in] has an adapter of its own, or none: see `by_row`.
    token_index: int32 [...], of each token of x in the whole batch, where x is a part of that: what is dropped is
    decided by rng and index, so that it does not depend on how the batch is cut.
    """
    if "lora_row" in lora:
        a = jnp.take(lora["lora_a"], lora["lora_row"], axis=0, mode="clip").astype(x.dtype)
        return by_row(lora, x.reshape(len(a), -1, x.shape[-1]) @ a, y)
    dropped, base = x, y
    if rng is not None and "lora_dropout" in lora:
        keep = 1 - lora["lora_dropout"]
        dropped = jnp.where(_kept(rng, keep, x, token_index), x / keep.astype(x.dtype), 0)
    scaled_b = lora["lora_b"] * lora["lora_scale"]
    update = low_rank(dropped, lora["lora_a"].astype(x.dtype), scaled_b.astype(x.dtype))
    if "lora_magnitude" not in lora:
        return y + update
    if dropped is not x:
        base = product(dropped)
    # The norm is taken as a constant (section 4.3 of the paper): its gradient costs memory and changes little.
    norms = jax.lax.stop_gradient(column_norms(kernel(jnp.float32), lora["lora_a"], scaled_b))
    # A layer of a stack that has no adapter has the scale 0.
    factor = jnp.where(lora["lora_scale"] == 0, 1, lora["lora_magnitude"] / norms).astype(y.dtype)
    return y + (factor - 1) * base + factor * update


def is_plain(lora: Mapping[str, jax.Array], rng: jax.Array | None) -> bool:
    """Whether what `adapt` gives is no more than y + scale (x A) B, for all rows."""
    return not lora.keys() & {"lora_row", "lora_magnitude"} and (rng is None or "lora_dropout" not in lora)


def by_row(lora: Mapping[str, jax.Array], inner: jax.Array, y: jax.Array) -> jax.Array:
    """What `adapt` gives where rows have other adapters, from inner = x A [rows, T, r] and y = x W [rows, ..., out].

    lora: `lora_a` [adapters, in, r], `lora_b` [adapters, r, out] times its scale, `lora_row` int32 [rows]: which of
    them; -1 is none.

    The factors of each row are gathered where they are used. To multiply all rows by all adapters, and keep of it what
    is each row's, is faster with two of them, and as slow as they are many: the MLPs of a 135M model on 2 cores, 16
    rows of a token, rank 16, take 31 ms alone, gathered 51 to 58 ms with 2 to 128 adapters, the other way 31 to 368;
    1,024 tokens of 8 prompts 1,068, 1,150 and 1,188 to 6,337 ms. To gather them once, before the first layer, takes
    as long and holds an adapter for each row.
    """
    row = lora["lora_row"]
    b = jnp.take(lora["lora_b"], row, axis=0, mode="clip").astype(inner.dtype)
    # Chosen, and not multiplied by 0: an adapter that gives infinities gives them to its own rows only.
    update = jnp.where((row >= 0)[:, None, None], inner @ b, 0)
    return y + update.reshape(y.shape)


def _kept(rng: jax.Array, keep: jax.Array, x: jax.Array, token_index: jax.Array | None) -> jax.Array:
    """bool [..., in]: what is kept, each token's own draw."""
    rows = x.shape[:-1]
    token_index = jnp.arange(math.prod(rows)) if token_index is None else token_index.reshape(-1)
    draw = jax.vmap(lambda index: jax.random.bernoulli(jax.random.fold_in(rng, index), keep, x.shape[-1:]))
    return draw(token_index).reshape(x.shape)


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [..., out]: the L2 norms of the columns of W + A B, without making that matrix.

    kernel W [..., in, out]; a [..., in, r]; b [..., r, out], all float32.
    """
    inner = jnp.matmul(a.mT, kernel, precision="highest")  # [..., r, out]
    gram = jnp.matmul(a.mT, a, precision="highest")
    squares = jnp.sum(kernel * kernel, axis=-2) + 2 * jnp.sum(inner * b, axis=-2)
    squares = squares + jnp.sum(jnp.matmul(gram, b, precision="highest") * b, axis=-2)
    return jnp.sqrt(jnp.maximum(squares, 0))


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x A) B: x [..., in], a [in, r], b [r, out] -> [..., out]."""
    if onednn.in_use():
        return onednn.product(onednn.product(x, a, x.dtype), b, x.dtype)
    return _low_rank(x, a, b)


@jax.custom_vjp
def _low_rank(x, a, b):
    """Its gradient is written out so that each product has its narrow operand on the left. In the order that JAX
    derives, XLA on CPUs transposes the wide ones first, which costs more than the products.
    """
    return (x @ a) @ b


def _low_rank_forward(x, a, b):
    inner = x @ a
    return inner @ b, (x, inner, a, b)


def _low_rank_backward(saved, out):
    x, inner, a, b = saved
    rows = tuple(range(x.ndim - 1))
    d_inner = out @ b.T
    d_a = jax.lax.dot_general(d_inner, x, ((rows, rows), ((), ()))).T
    d_b = jax.lax.dot_general(inner, out, ((rows, rows), ((), ())))
    return d_inner @ a.T, d_a, d_b


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)
