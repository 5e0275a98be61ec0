"""The decoder: embedding, one scanned stack of pre-norm blocks, final norm, head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.attention import attention, rotary
from ftjax.models.cache import Cache, write
from ftjax.models.layers import Embedding, Linear, RMSNorm
from ftjax.models.spec import DecoderSpec
from ftjax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Attention(nn.Module):
    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, layer_cache, positions, segment_ids, key_positions, key_segments, start):
        """x [B, T, D]; layer_cache: None or (keys, values) [B, S, K, d]. Returns [B, T, D] and the cache's new part."""
        spec = self.spec

        def heads(name, count, axis):
            linear = Linear(count * spec.head_dim, ("embed", axis), self.dtype, self.param_dtype, name=name)
            return linear(x).reshape(*x.shape[:2], count, spec.head_dim)

        queries = rotary(heads("q_proj", spec.num_attention_heads, "heads"), positions, spec.rope_theta)
        keys = rotary(heads("k_proj", spec.num_key_value_heads, "kv_heads"), positions, spec.rope_theta)
        values = heads("v_proj", spec.num_key_value_heads, "kv_heads")
        new = None
        if layer_cache is not None:
            # Only what is new goes back out of the scan: returning the whole cache would copy it for every token.
            new = (keys, values)
            keys, values = (write(cached, fresh, start) for cached, fresh in zip(layer_cache, new))
        out = attention(queries, keys, values, positions, key_positions, segment_ids, key_segments)
        out = out.reshape(*x.shape[:2], -1)
        o_proj = Linear(spec.hidden_size, ("heads", "embed"), self.dtype, self.param_dtype, name="o_proj")
        return o_proj(out), new


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(name, features, axes):
            return Linear(features, axes, self.dtype, self.param_dtype, name=name)

        gate = linear("gate_proj", self.spec.intermediate_size, ("embed", "mlp"))(x)
        up = linear("up_proj", self.spec.intermediate_size, ("embed", "mlp"))(x)
        return linear("down_proj", self.spec.hidden_size, ("mlp", "embed"))(nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer, shaped for `nn.scan`: (x, this layer's cache) -> (x, its new keys and values)."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, layer_cache, *broadcast):
        def norm(name):
            return RMSNorm(self.spec.rms_norm_eps, self.dtype, self.param_dtype, name=name)

        x = constrain(x, "batch", "length", "width")
        attend = Attention(self.spec, self.dtype, self.param_dtype, name="self_attn")
        attended, new = attend(norm("input_layernorm")(x), layer_cache, *broadcast)
        x = x + attended
        x = x + MLP(self.spec, self.dtype, self.param_dtype, name="mlp")(norm("post_attention_layernorm")(x))
        return constrain(x, "batch", "length", "width"), new


class Decoder(nn.Module):
    """A decoder-only language model.

    `apply({"params": p}, ...)` is the base model; with a `lora` collection beside it, the adapted one.
    dtype: of activations and matrix products (norms, softmax and logits are float32 regardless); param_dtype: of
    stored parameters; remat: one of REMAT_POLICIES.
    """

    spec: DecoderSpec
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size, *dtypes)
        policy = REMAT_POLICIES[self.remat]
        # Inside a scan XLA cannot undo the rematerialisation, so its guard against that would only cost time.
        block = nn.remat(Block, policy=policy, prevent_cse=False) if policy else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 5),
            length=spec.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(spec, *dtypes)
        self.norm = RMSNorm(spec.rms_norm_eps, *dtypes)
        if not spec.tie_word_embeddings:
            self.lm_head = Linear(spec.vocab_size, ("embed", "vocab"), *dtypes, out_dtype=jnp.float32)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """tokens, positions, segment_ids: int32 [B, T] (segment 0 is padding).

        Returns the hidden states after the final norm, [B, T, D] (see `unembed`), and the cache with these tokens in.
        """
        x = constrain(self.embed_tokens(tokens), "batch", "length", "width")
        if cache is None:
            x, _ = self.layers(x, None, positions, segment_ids, positions, segment_ids, None)
            return self.norm(x), None
        start = cache.length
        key_positions = write(cache.positions, positions, start)
        key_segments = write(cache.segment_ids, segment_ids, start)
        x, (keys, values) = self.layers(
            x, (cache.keys, cache.values), positions, segment_ids, key_positions, key_segments, start
        )
        keys, values = write(cache.keys, keys, start, axis=2), write(cache.values, values, start, axis=2)
        return self.norm(x), Cache(keys, values, key_positions, key_segments, start + tokens.shape[1])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., vocab]."""
        if self.spec.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)

    def init_all(self, tokens: jax.Array) -> None:
        """For `init` only: touches every parameter, the untied head included."""
        ones = jnp.ones_like(tokens)
        self.unembed(self(tokens, ones, ones)[0])
