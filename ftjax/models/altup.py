"""AltUp (Baykal et al. 2023) and LAuReL (Menghani et al. 2024), as Gemma 3n has them.

The residual stream is several of the model's width, side by side in an array [B, T, streams * D]. A layer predicts all
of them from all, computes one, and corrects each by what that one turned out to be.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.layers import NORMS, Linear
from ftjax.models.spec import DecoderSpec

_LEAST = 1e-30  # below which a mean of squares counts as this: roots have no gradient at 0


class Streams(nn.Module):
    """Makes the streams of a token's embedding, and one hidden state of what the layers have made of them."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        def projections(name: str) -> list[Linear]:
            return [
                Linear(self.spec.hidden_size, ("embed", None), self.dtype, self.param_dtype, name=f"{name}_{number}")
                for number in range(self.spec.altup.streams - 1)
            ]

        self.into, self.out = projections("altup_projections"), projections("altup_unembed_projections")

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, streams * D]"""
        return jnp.concatenate([x, *(_as_large(project(x), x) for project in self.into)], axis=-1)

    def joined(self, x: jax.Array) -> jax.Array:
        """[B, T, streams * D] -> [B, T, D]"""
        first, *others = jnp.split(x, self.spec.altup.streams, axis=-1)
        parts = [first, *(_as_large(project(other), first) for project, other in zip(self.out, others, strict=True))]
        return jnp.mean(jnp.stack(parts), axis=0)


def _as_large(x: jax.Array, like: jax.Array) -> jax.Array:
    """x times what gives it the root mean square of `like`, in its dtype."""
    wanted, there = (jnp.mean(jnp.square(each.astype(jnp.float32)), axis=-1, keepdims=True) for each in (like, x))
    factor = jnp.sqrt(jnp.maximum(wanted, _LEAST)) / jnp.sqrt(jnp.maximum(there, 1e-5))
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class AltUp(nn.Module):
    """The prediction before a layer, the correction after it. Names of parameters are Hugging Face's."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        spec, streams, dtypes = self.spec, self.spec.altup.streams, (self.dtype, self.param_dtype)
        self.prediction_coefs = Linear(streams**2, (None, None), *dtypes)
        self.correction_coefs = Linear(streams, (None, None), *dtypes)
        self.modality_router = Linear(streams, ("embed", None), *dtypes)
        self.router_norm = NORMS[spec.norm](spec.norm_eps, *dtypes)
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        self.correct_output_scale = self.param("correct_output_scale", init, (spec.hidden_size,), self.param_dtype)

    def predict(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, streams * D] -> the predicted streams [B, T, streams, D], and of them the one that is computed."""
        streams, active = self.spec.altup.streams, self.spec.altup.active
        x = x.reshape(*x.shape[:2], streams, -1)
        weights = self.prediction_coefs(self._modalities(x[:, :, active])).reshape(*x.shape[:2], streams, streams)
        predicted = x + jnp.einsum("btji,btid->btjd", weights, x)
        return predicted, predicted[:, :, active]

    def correct(self, predicted: jax.Array, computed: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The corrected streams [B, T, streams, D], and the computed one of them, scaled where the spec says so."""
        active = self.spec.altup.active
        weights = self.correction_coefs(self._modalities(computed)) + 1
        corrected = predicted + weights[..., None] * (computed - predicted[:, :, active])[:, :, None]
        scale = self.correct_output_scale.astype(self.dtype) if self.spec.altup.scaled else 1
        return corrected, corrected[:, :, active] * scale

    def _modalities(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, streams]"""
        routed = self.modality_router(self.router_norm(x) * jnp.asarray(1 / self.spec.hidden_size, self.dtype))
        return jnp.tanh(routed.astype(jnp.float32)).astype(self.dtype)


def others_added(streams: jax.Array, added: jax.Array) -> jax.Array:
    """[B, T, streams, D] with `added` [B, T, D] in all but the first -> [B, T, streams * D]"""
    return streams.at[:, :, 1:].add(added[:, :, None]).reshape(*streams.shape[:2], -1)


class Laurel(nn.Module):
    """A second residual path, of low rank."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]"""
        spec, dtypes = self.spec, (self.dtype, self.param_dtype)
        inner = Linear(spec.laurel_rank, ("embed", None), *dtypes, name="linear_left")(x)
        out = Linear(spec.hidden_size, (None, "embed"), *dtypes, name="linear_right")(inner)
        return x + NORMS[spec.norm](spec.norm_eps, *dtypes, name="post_laurel_norm")(out)
