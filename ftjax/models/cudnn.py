"""cuDNN's flash attention for NVIDIA GPUs, through `jax.nn`: no scores in memory.

What keeps the examples of a row apart, and windows, go in as a mask: [B, T, T] numbers of two bytes, and as many in the
backward pass, where XLA has as many of four bytes for every head. Blocks above the diagonal are skipped, those between
examples are not.
"""

import jax
import jax.numpy as jnp

from ftjax.models.attention import sees
from ftjax.models.spec import DecoderSpec


def cannot(spec: DecoderSpec, dtype: jnp.dtype, length: int, parts: int) -> str:
    """What cuDNN cannot serve of rows of `length` tokens over `parts` devices; "" if it can."""
    capability = _capability()
    largest = 256 if capability >= (9, 0) else 128
    reasons = {
        f"{jnp.dtype(dtype).name} (model.dtype can be bfloat16)": jnp.dtype(dtype).itemsize != 2,
        "soft caps": spec.attention_softcap is not None,
        "sinks": spec.attention_sinks,
        f"heads of {spec.head_dim} dimensions here": spec.head_dim % 8 or spec.head_dim > largest,
        f"rows of {length} tokens, an odd number": length % 2,
        "rows split over context": parts > 1,
        "GPUs before NVIDIA's Ampere": capability < (8, 0),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """As models.attention.attention, on one device."""
    mask = sees(query_positions, key_positions, query_segments, key_segments, window)[:, None]
    queries = queries * jnp.asarray(scale, queries.dtype)
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=1.0, is_causal=True, implementation="cudnn"
    )


def _capability() -> tuple[int, int]:
    """Of this machine's GPU, (8, 0) for instance; (0, 0) where it has none or not NVIDIA's."""
    devices = [device for device in jax.local_devices() if device.platform == "gpu"]
    known = str(getattr(devices[0], "compute_capability", "")) if devices else ""
    major, _, minor = known.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
