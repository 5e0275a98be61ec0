"""Which attention runs where: splash on TPUs, cuDNN on GPUs, oneDNN on CPUs whose other products it makes, XLA
elsewhere and for what those cannot serve.

All compute what models.attention.attention says. The choice is made while tracing, by the devices of the mesh in use:
a program compiled for TPUs on a machine without any is the one that would run there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ftjax.errors import UserError
from ftjax.models import cudnn, onednn_attention, splash
from ftjax.models.attention import attention, attention_of_rows
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import AnyMesh, partition_spec, platform

SHARED = "documents that share what they begin with (data.share_prefixes)"
KERNELS = {"splash": "tpu", "cudnn": "gpu", "onednn": "cpu"}  # and where each runs


class Choice(NamedTuple):
    name: str  # of KERNELS, or xla
    reason: str  # why it is xla where there is a kernel, or where one was asked for; else ""


def choose(
    wanted: str,
    spec: DecoderSpec,
    dtype: jnp.dtype,
    length: int,
    mesh: AnyMesh,
    matmul: str = "xla",
    shares: bool = False,
) -> Choice:
    """The attention of rows of `length` tokens without a cache, on `mesh`'s devices.

    wanted: config.model.attention; dtype: of activations; matmul: xla or onednn, shares: see `Decoder`. What decodes
    token by token from a cache uses XLA, or what onednn has for that. UserError for a kernel that cannot serve a model
    whatever the devices are.
    """
    where = platform(mesh)
    if spec.vision is not None and spec.vision.two_way:
        if wanted in KERNELS:
            raise UserError(
                f"config.model.attention={wanted!r}: the tokens of an image see each other both ways in a "
                f"{spec.vision.family} model, which {wanted} cannot serve; use 'auto' or 'xla'"
            )
        return Choice("xla", "")
    if wanted == "auto":
        wanted = next((name for name, its in KERNELS.items() if its == where), "xla")
        wanted = "xla" if wanted == "onednn" and matmul != "onednn" else wanted
    if wanted == "xla":
        return Choice("xla", "")
    if where != KERNELS[wanted]:
        return Choice("xla", f"{wanted} is for {KERNELS[wanted]} devices, and these are {where}")
    if wanted == "onednn" and matmul != "onednn":
        return Choice("xla", "onednn is for config.model.matmul='onednn'")
    context = 1 if mesh.empty else mesh.shape["context"]
    lacks = {
        "splash": lambda: SHARED if shares else splash.cannot(spec, length, context),
        "cudnn": lambda: SHARED if shares else cudnn.cannot(spec, dtype, length, context),
        "onednn": lambda: onednn_attention.cannot(spec, shares),
    }[wanted]()
    reason = _heads(spec, mesh) or lacks
    return Choice("xla", f"{wanted} cannot serve {reason}") if reason else Choice(wanted, "")


def attend(
    choice: Choice,
    spec: DecoderSpec,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    scale: float | jax.Array,
    window: int | jax.Array | None,
    sinks: jax.Array | None,
    last: jax.Array | None = None,
    until: jax.Array | None = None,
) -> jax.Array:
    """Attention of whole rows, over the mesh in use: arguments and result as of models.attention.attention_of_rows."""
    mesh, softcap = jax.sharding.get_abstract_mesh(), spec.attention_softcap
    places = (positions, positions, segment_ids, segment_ids)
    if choice.name == "xla" and (mesh.empty or mesh.shape["context"] == 1):  # XLA splits it over the mesh itself
        further = {} if last is None else {"last": last, "ahead": spec.vision.tokens}
        return attention_of_rows(
            queries, keys, values, positions, segment_ids, scale, window, softcap, sinks, until=until, **further
        )
    if until is not None and not mesh.empty and mesh.shape["context"] > 1:
        raise ValueError("documents that share what they begin with cannot be split over context")
    same = window if isinstance(window, int) else None  # in all layers: known while compiling
    run = functools.partial(_local, choice, spec, same)
    given = {"scale": scale, "window": window if same is None else None, "sinks": sinks, "last": last, "until": until}
    given = {name: x for name, x in given.items() if x is not None}
    if mesh.empty or mesh.size == 1:
        return run(_tables(choice, spec, queries.shape[1], 1, 1), queries, keys, values, *places, given)
    q_axes, kv_axes = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    split = partition_spec(q_axes, queries.shape, mesh)
    rows, parts, heads, _ = split
    whole, part = P(rows), P(rows, parts)
    tables = _tables(choice, spec, queries.shape[1], mesh.shape[heads] if heads else 1, mesh.shape["context"])
    specs = (
        splash.table_specs(tables, mesh, parts),
        split,
        *2 * (partition_spec(kv_axes, keys.shape, mesh),),
        *(part, whole, part, whole),
        {name: {"sinks": P(heads), "last": part, "until": whole}.get(name, P()) for name in given},
    )
    over_mesh = jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)
    return over_mesh(tables, queries, keys, values, *places, jax.tree.map(jnp.asarray, given))


def _local(
    choice, spec, window, tables, queries, keys, values, positions, key_positions, segments, key_segments, given
):
    """On one device: its rows, its part of their queries and their keys, its heads."""
    scale, window, sinks = given["scale"], given.get("window", window), given.get("sinks")
    if keys.shape[1] < key_segments.shape[1]:  # a part sees the whole row, whose keys are small beside their scores
        keys, values = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (keys, values))
    keys, values = (_own_heads(x, queries.shape[2], spec) for x in (keys, values))
    if choice.name == "splash":
        return splash.attention(tables, queries, keys, values, segments, key_segments, scale, window, sinks)
    places = (positions, key_positions, segments, key_segments)
    if choice.name == "cudnn":
        return cudnn.attention(queries, keys, values, positions, segments, scale, window)
    if choice.name == "onednn":
        shared = {} if given.get("until") is None else {"positions": positions, "until": given["until"]}
        return onednn_attention.attention(queries, keys, values, segments, scale, window, **shared)
    return attention(queries, keys, values, *places, scale, window, spec.attention_softcap, sinks, given.get("last"))


def _own_heads(x: jax.Array, heads: int, spec: DecoderSpec) -> jax.Array:
    """Of the keys or values [B, S, K, d] of all heads those that this device's `heads` queries' heads use."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    if heads == spec.num_attention_heads or x.shape[2] < spec.num_key_value_heads:
        return x
    first = jax.lax.axis_index("tensor") * heads
    if heads % group and group % heads:  # they begin or end within a group: each head its own copy of the keys
        return jnp.take(x, (first + jnp.arange(heads)) // group, axis=2)
    return jax.lax.dynamic_slice_in_dim(x, first // group, max(heads // group, 1), axis=2)


def _heads(spec: DecoderSpec, mesh: AnyMesh) -> str:
    """What is wrong with how the heads fall on `tensor`: "" if every device has whole groups or parts of one."""
    count, group, parts = spec.num_attention_heads, spec.num_attention_heads // spec.num_key_value_heads, 1
    if not mesh.empty and count % mesh.shape["tensor"] == 0:
        parts = mesh.shape["tensor"]
    here = count // parts
    if here % group == 0 or group % here == 0:
        return ""
    return f"{count} heads in groups of {group} over tensor={parts}"


def _tables(choice, spec, length, head_parts, parts):
    if choice.name != "splash":
        return {}
    return splash.make_kernels(
        spec.layer_windows, spec.num_attention_heads // head_parts, length, parts, spec.attention_softcap
    )
