"""cuDNN's flash attention for NVIDIA GPUs: no scores in memory.

From Hopper on its kernel is told where the documents of a row begin, and computes nothing between them. That needs
a bound on their number beforehand, and costs more the higher this is: PACKED has the bounds that are compiled. Rows of
more documents, older GPUs, and windows that differ between layers have a mask instead, [B, T, T] numbers of two bytes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ftjax.models.attention import sees
from ftjax.models.spec import DecoderSpec

PACKED = (16, 64)  # documents of a row, at most


class Documents(NamedTuple):
    """Where the documents of rows lie; padding counts as one. int32 [B, M], -1 where there are no more."""

    starts: jax.Array
    lengths: jax.Array
    most: jax.Array  # scalar: of any row, whether or not M has room for them


def cannot(spec: DecoderSpec, dtype: jnp.dtype, length: int, parts: int) -> str:
    """What cuDNN cannot serve of rows of `length` tokens over `parts` devices; "" if it can."""
    capability = _capability()
    largest, width = 256 if capability >= (9, 0) else 128, max(spec.head_dim, spec.value_dim)
    reasons = {
        f"{jnp.dtype(dtype).name} (model.dtype can be bfloat16)": jnp.dtype(dtype).itemsize != 2,
        "soft caps": spec.attention_softcap is not None,
        "sinks": spec.attention_sinks,
        f"heads of {width} dimensions here": width % 8 or width > largest,
        f"rows of {length} tokens, an odd number": length % 2,
        "rows split over context": parts > 1,
        "GPUs before NVIDIA's Ampere": capability < (8, 0),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """As models.attention.attention, of whole rows on one device."""
    queries, columns = queries * jnp.asarray(scale, queries.dtype), values.shape[-1]
    # The kernel has one width for all three. More columns of values are as many more of the result, zeros.
    width = max(queries.shape[-1], columns)
    queries, keys, values = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (queries, keys, values))
    return _whole_rows(queries, keys, values, positions, segments, window)[..., :columns]


def _whole_rows(queries, keys, values, positions, segments, window):
    sizes = tuple(size for size in PACKED if size < segments.shape[1])
    if _capability() < (9, 0) or isinstance(window, jax.Array) or not sizes:
        return _masked(positions, segments, window, queries, keys, values)
    return _either(window, sizes, queries, keys, values, documents(segments, max(sizes)), positions, segments)


def documents(segments: jax.Array, most: int) -> Documents:
    """Of rows of segment ids int32 [B, T], whose tokens of a segment lie one after the other; M is `most`."""
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=most, fill_value=-1)[0])(first).astype(jnp.int32)
    following = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends = jnp.where(following < 0, segments.shape[1], following)
    return Documents(starts, jnp.where(starts < 0, -1, ends - starts), first.sum(axis=1).max())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _either(window, sizes, queries, keys, values, where, positions, segments):
    """With the least of `sizes` that has room for the documents, or with a mask.

    The gradient is written out, because JAX's own would keep for the backward pass what every branch might need.
    """
    branch, ways = _ways(window, sizes, where, positions, segments)
    return jax.lax.switch(branch, ways, queries, keys, values)


def _either_forward(window, sizes, *given):
    return _either(window, sizes, *given), given


def _either_backward(window, sizes, given, gradient):
    branch, ways = _ways(window, sizes, *given[3:])

    def backward(way):
        return lambda gradient, *inputs: jax.vjp(way, *inputs)[1](gradient)

    return *jax.lax.switch(branch, [backward(way) for way in ways], gradient, *given[:3]), None, None, None


_either.defvjp(_either_forward, _either_backward)


def _ways(
    window: int | None, sizes: tuple[int, ...], where: Documents, positions: jax.Array, segments: jax.Array
) -> tuple[jax.Array, list[Callable[..., jax.Array]]]:
    """(which, functions of queries, keys and values)"""
    packed = (functools.partial(_packed, window, Documents(*(x[:, :size] for x in where[:2]), None)) for size in sizes)
    return (where.most > jnp.array(sizes)).sum(), [*packed, functools.partial(_masked, positions, segments, window)]


def _packed(window, where, queries, keys, values):
    # Not in jax.nn.dot_product_attention, which knows no offsets.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    offsets = jnp.pad(where.starts, ((0, 0), (0, 1)), constant_values=-1)
    places = {"q_seqlen": where.lengths, "kv_seqlen": where.lengths, "q_offsets": offsets, "kv_offsets": offsets}
    kind = MaskType.PADDING_CAUSAL
    return dot_product_attention(queries, keys, values, **places, mask_type=kind, sliding_window_length=window)


def _masked(positions, segments, window, queries, keys, values):
    mask = sees(positions, positions, segments, segments, window)[:, None]
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=1.0, is_causal=True, implementation="cudnn"
    )


def _capability() -> tuple[int, int]:
    """Of this machine's GPU, (8, 0) for instance; (0, 0) where it has none or not NVIDIA's."""
    devices = [device for device in jax.local_devices() if device.platform == "gpu"]
    known = str(getattr(devices[0], "compute_capability", "")) if devices else ""
    major, _, minor = known.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
