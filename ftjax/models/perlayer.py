"""Embeddings of tokens of which each layer gets a part of its own (Gemma 3n and 4): made once, added in every layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.layers import ACTIVATIONS, NORMS, Embedding, Linear
from ftjax.models.spec import DecoderSpec


class PerLayerInputs(nn.Module):
    """What all layers get, from the tokens and from their embeddings."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, embedded: jax.Array) -> jax.Array:
        """tokens int32 [B, T], embedded [B, T, D] in `dtype` -> [layers, B, T, width]"""
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)
        layers, rows, width = spec.num_hidden_layers, spec.per_layer.rows, spec.per_layer.width
        # Tokens beyond the table are those of images and sound, for which transformers looks up the first row.
        tokens = jnp.where(tokens < rows, tokens, 0)
        found = Embedding(rows, layers * width, *dtypes, name="embed_tokens_per_layer")(tokens)
        seen = Linear(layers * width, ("embed", None), *dtypes, name="per_layer_model_projection")(embedded)
        found, seen = (x.reshape(*tokens.shape, layers, width) for x in (found, seen))
        # The norm undoes a scale before it but for its epsilon, which is meant for such small values.
        seen = seen * jnp.asarray(spec.hidden_size**-0.5, self.dtype)
        seen = NORMS[spec.norm](spec.norm_eps, *dtypes, name="per_layer_projection_norm")(seen)
        found = found * jnp.asarray(width**0.5, self.dtype)
        return jnp.moveaxis((seen + found) * jnp.asarray(2.0**-0.5, self.dtype), 2, 0)


def gated(spec: DecoderSpec, dtypes: tuple[jnp.dtype, jnp.dtype], x: jax.Array, part: jax.Array) -> jax.Array:
    """What a layer adds of its part [B, T, width] to x [B, T, D]; to be called where a layer makes its modules."""
    axes = ("embed", None)
    gate = Linear(spec.per_layer.width, axes, *dtypes, name="per_layer_input_gate")(x)
    inner = ACTIVATIONS[spec.hidden_act](gate) * part
    out = Linear(spec.hidden_size, axes[::-1], *dtypes, name="per_layer_projection")(inner)
    return NORMS[spec.norm](spec.norm_eps, *dtypes, name="post_per_layer_input_norm")(out)
