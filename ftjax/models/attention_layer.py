"""Attention as a layer: projections, norms, RoPE, and the attention of what the layer sees."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ftjax.models import onednn
from ftjax.models.attention import attention_after, chunk_segments
from ftjax.models.cache import InPlace
from ftjax.models.kernels import attend, choose
from ftjax.models.layers import NORMS, Linear, RMSNorm
from ftjax.models.onednn_attention import of_next_token
from ftjax.models.rope import rotate, table_of_layers
from ftjax.models.spec import DecoderSpec

LATENT_EPS = 1e-6  # of the norms in latent attention, whatever the config says of others


class Context(NamedTuple):
    """What every layer reads alike."""

    positions: jax.Array  # int32 [B, T], as segment_ids
    segment_ids: jax.Array
    tables: tuple[jax.Array, jax.Array] | None  # cosines and sines, float32 [ropes, B, T, pairs]
    lent: dict[int, Any]  # keys and values of earlier layers that later ones use, see lent.py
    cached: dict[str, tuple[jax.Array, jax.Array]]  # keys and values of stacks, for cache.InPlace
    last: jax.Array | None = None  # int32 [B, T], see vision.last_seen; None: each token sees none after itself
    until: jax.Array | None = None  # int32 [B, T], see attention.seen_until; None: each document is by itself
    there: jax.Array | None = None  # bool [B, T], see `blanked`


class Attention(nn.Module):
    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: str

    @nn.compact
    def __call__(self, x, layer_cache, layer, context):
        """x [B, T, D] -> [B, T, D], and the keys and values [B, K, T, d] of these tokens unless layer_cache is None.

        layer_cache: (keys, values) [B, K, S, d] of the tokens before, or an InPlace; () where there are none. Values
        have a width of their own, spec.value_dim. A layer that uses another's keys and values takes and returns none.

        layer: {"rope", "window", "chunk", "scale"}, scalars of this layer for those in which layers differ (see
        `_per_layer`).
        """
        spec = self.spec
        # Of queries, keys and values; of queries alone, where those of another layer are used.
        own = self._from_latent(x) if spec.latent else self._project(x)
        rope = layer.get("rope", table_of_layers(spec)[0])
        if context.tables is not None:
            pairs = max((len(spec.ropes[rope].frequencies) for rope in spec.layer_ropes if rope is not None), default=0)
            cos, sin = (table[rope][..., :pairs] for table in context.tables)
            own |= {name: rotate(own[name], cos, sin, spec.rope_interleaved) for name in "qk" if name in own}
        is_turned = rope < len(spec.ropes)
        if spec.qk_norm_last:
            normed = {name: self._normed(own[name], name) for name in "qk" if name in own}
            if spec.norm_or_scale:
                normed = {name: jnp.where(is_turned, new, own[name]) for name, new in normed.items()}
            own |= normed
        queries = own["q"]
        if spec.position_scale is not None:
            beta, period, first = spec.position_scale
            factor = 1 + beta * jnp.log1p(((context.positions + first) // period).astype(jnp.float32))
            factor = jnp.where(is_turned, 1.0, factor) if spec.norm_or_scale else factor
            queries = queries * factor[..., None, None].astype(queries.dtype)
        sinks = None
        if spec.attention_sinks:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
            sinks = self.param("sinks", init, (spec.num_attention_heads,), self.param_dtype)
        scale, window = layer.get("scale", spec.attention_scales[0]), layer.get("window", spec.layer_windows[0])
        positions, segment_ids = context.positions, context.segment_ids
        if any(spec.layer_chunks):
            chunk = layer.get("chunk", spec.layer_chunks[0])
            if layer_cache:  # a window of each query's own, back to where its chunk begins
                reach = (positions % chunk + 1)[..., None]
                window = reach if window is None else jnp.minimum(window, reach)
            else:
                segment_ids = chunk_segments(positions, segment_ids, chunk)
        numbers, places = (scale, window), (positions, segment_ids)
        if spec.kv_layer is not None:
            seen, layer_cache = context.lent[spec.kv_layer]
            keys, values = (x.transpose(0, 2, 1, 3) for x in seen)
            new = ()
        else:
            keys, values = own["k"], own["v"]
            # Only what is new goes back out of the scan: returning the whole cache would copy it for every token.
            new = seen = None if layer_cache is None else tuple(x.transpose(0, 2, 1, 3) for x in (keys, values))
        if isinstance(layer_cache, InPlace):
            cached = context.cached[layer_cache.stack]
            upto = jnp.where(segment_ids > 0, positions, 0)  # what has ended reads nothing
            out = of_next_token(queries, *seen, *cached, layer_cache.layer, upto, *numbers)
        elif layer_cache:
            out = attention_after(
                queries, *seen, *layer_cache, *places, *numbers, spec.attention_softcap, sinks, context.last
            )
        else:
            mesh = jax.sharding.get_abstract_mesh()
            matmul = "onednn" if onednn.in_use() else "xla"
            shares = context.until is not None
            choice = choose(self.kernel, spec, queries.dtype, queries.shape[1], mesh, matmul, shares)
            out = attend(choice, spec, queries, keys, values, *places, *numbers, sinks, context.last, context.until)
        out = blanked(out.reshape(*x.shape[:2], -1), context.there)
        out = out * nn.sigmoid(own["gate"]) if "gate" in own else out
        axes = ("heads", "embed")
        o_proj = Linear(spec.hidden_size, axes, self.dtype, self.param_dtype, use_bias=spec.o_bias, name="o_proj")
        return o_proj(out), new

    def _project(self, x: jax.Array) -> dict[str, jax.Array]:
        """Queries "q" [B, T, H, d], keys "k" and values "v" [B, T, K, d], normed where the spec says so, and its "gate"
        [B, T, H d].
        """
        spec = self.spec
        counts = {"q": spec.num_attention_heads, "k": spec.num_key_value_heads, "v": spec.num_key_value_heads}
        if spec.kv_layer is not None:
            counts = {"q": spec.num_attention_heads}
        projected = [name for name in counts if name != "v" or not spec.values_are_keys]

        def linear(name, heads, axis):
            features, bias = heads * spec.head_dim, spec.qkv_bias
            features *= 2 if name == "q_proj" and spec.attention_gate else 1
            return Linear(features, ("embed", axis), self.dtype, self.param_dtype, use_bias=bias, name=name)(x)

        if spec.fused_qkv:
            fused = linear("qkv_proj", sum(counts.values()), "heads")
            ends = np.cumsum([count * spec.head_dim for count in counts.values()])
            parts = dict(zip(counts, jnp.split(fused, ends[:-1], axis=-1)))
        else:
            parts = {
                name: linear(f"{name}_proj", counts[name], "heads" if name == "q" else "kv_heads") for name in projected
            }
        gate = None
        if spec.attention_gate:  # of each head its query and its gate
            both = parts["q"].reshape(*x.shape[:2], spec.num_attention_heads, -1)
            parts["q"], gate = (part.reshape(*x.shape[:2], -1) for part in jnp.split(both, 2, axis=-1))
        if spec.qkv_clip is not None:
            parts = {name: jnp.clip(part, -spec.qkv_clip, spec.qkv_clip) for name, part in parts.items()}
        if spec.qk_norm == "projection":
            parts |= {name: self._normed(parts[name], name) for name in "qk" if name in parts}
        parts = {name: part.reshape(*x.shape[:2], counts[name], spec.head_dim) for name, part in parts.items()}
        if "k" in parts and spec.values_are_keys:
            parts["v"] = parts["k"]
        if "v" in parts and spec.v_norm:
            parts["v"] = norm_of(spec, self.dtype, self.param_dtype, None, "rms_bare")(parts["v"])
        if spec.qk_norm in ("head", "heads", "bare") and not spec.qk_norm_last:
            parts |= {name: self._normed(parts[name], name) for name in "qk" if name in parts}
        return parts if gate is None else parts | {"gate": gate}

    def _from_latent(self, x: jax.Array) -> dict[str, jax.Array]:
        """As `_project`: "q" and "k" [B, T, H, d], the dimensions that RoPE turns first, and "v" [B, T, H, e]."""
        spec, latent, heads = self.spec, self.spec.latent, self.spec.num_attention_heads
        dtypes, untouched = (self.dtype, self.param_dtype), spec.head_dim - latent.turned

        def linear(name, features, axes, x, bias=False):
            return Linear(features, axes, *dtypes, use_bias=bias, name=name)(x)

        def low(name, features, x):
            return linear(name, features, ("embed", None), x, spec.qkv_bias)

        def high(name, width, x):  # [B, T, rank] -> [B, T, H, width]
            return linear(name, heads * width, ("embed", "heads"), x).reshape(*x.shape[:2], heads, width)

        if latent.q_rank is None:
            queries = high("q_proj", spec.head_dim, x)
        else:
            own = RMSNorm(LATENT_EPS, *dtypes, name="q_a_layernorm")(low("q_a_proj", latent.q_rank, x))
            queries = high("q_b_proj", spec.head_dim, own)
        both = low("kv_a_proj_with_mqa", latent.kv_rank + latent.turned, x)
        shared = RMSNorm(LATENT_EPS, *dtypes, name="kv_a_layernorm")(both[..., : latent.kv_rank])
        made = high("kv_b_proj", untouched + latent.value_dim, shared)
        turned = jnp.broadcast_to(both[:, :, None, latent.kv_rank :], (*made.shape[:3], latent.turned))
        # Scores do not depend on the order of dimensions; files have those that are turned behind the others.
        queries = jnp.concatenate([queries[..., untouched:], queries[..., :untouched]], axis=-1)
        keys = jnp.concatenate([turned, made[..., :untouched]], axis=-1)
        return {"q": queries, "k": keys, "v": made[..., untouched:]}

    def _normed(self, x: jax.Array, name: str) -> jax.Array:
        """Queries ("q") or keys ("k"), of all heads at once or [..., heads, d], under their norm."""
        kind = {"heads": "layer_heads", "bare": "rms_bare"}.get(self.spec.qk_norm, self.spec.norm)
        return norm_of(self.spec, self.dtype, self.param_dtype, f"{name}_norm", kind)(x)


def blanked(x: jax.Array, there: jax.Array | None) -> jax.Array:
    """x [B, T, D] with zeros where nothing is `there`, bool [B, T]: in padding and in rows that have ended, which what
    generates would multiply in vain (`onednn.product_with_layer` leaves rows of zeros out). None: x as it is.
    """
    return x if there is None else jnp.where(there[..., None], x, jnp.zeros((), x.dtype))


def norm_of(spec: DecoderSpec, dtype: jnp.dtype, param_dtype: jnp.dtype, name: str | None, kind: str = "") -> nn.Module:
    return NORMS[kind or spec.norm](spec.norm_eps, dtype, param_dtype, name=name)
