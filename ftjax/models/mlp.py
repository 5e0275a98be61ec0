"""What stands between two attentions: the gated or plain MLP, and the mixture of experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.layers import ACTIVATIONS, INIT, Linear
from ftjax.models.spec import DecoderSpec


class MLP(nn.Module):
    """SwiGLU and its kin (Shazeer 2020), or the plain MLP of GPT-2."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec

        def linear(name, features, axes):
            return Linear(features, axes, self.dtype, self.param_dtype, use_bias=spec.mlp_bias, name=name)

        inner = _inner(spec, lambda name, features: linear(name, features, ("embed", "mlp"))(x))
        return linear("down_proj", spec.hidden_size, ("mlp", "embed"))(inner)


class Mixture(nn.Module):
    """Each token's MLP is a weighted sum of a few experts' (Shazeer et al. 2017; no token is ever dropped).

    Tokens are sorted by expert, so that every expert multiplies one dense block of rows.
    """

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, experts = self.spec, self.spec.experts
        flat = x.reshape(-1, x.shape[-1])
        router = Linear(
            experts.count,
            ("embed", None),
            self.dtype,
            self.param_dtype,
            out_dtype=jnp.float32,
            use_bias=experts.bias,
            name="router",
        )
        weights, chosen = _route(router(flat), experts.per_token, experts.normalize)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        rows = flat[order // experts.per_token]
        owners = chosen.reshape(-1)[order]
        sizes = jnp.bincount(chosen.reshape(-1), length=experts.count).astype(jnp.int32)
        out = Experts(spec, self.dtype, self.param_dtype, name="experts")(rows, owners, sizes)
        out = out[jnp.argsort(order)].reshape(flat.shape[0], experts.per_token, -1)
        return jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype)).reshape(x.shape)


class Experts(nn.Module):
    """The experts' MLPs. rows [N, D], sorted by expert; owners int32 [N]: the expert of each; sizes int32 [experts]."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, rows: jax.Array, owners: jax.Array, sizes: jax.Array) -> jax.Array:
        spec = self.spec

        def linear(name, features, axes):
            bias = spec.experts.bias
            return ExpertLinear(spec.experts.count, features, axes, self.dtype, self.param_dtype, bias, name=name)

        inner = _inner(spec, lambda name, features: linear(name, features, ("embed", "mlp"))(rows, owners, sizes))
        return linear("down_proj", spec.hidden_size, ("mlp", "embed"))(inner, owners, sizes)


class ExpertLinear(nn.Module):
    """y = x W_e + b_e for rows sorted by their expert e. Parameters: `kernel` [experts, in, features], `bias`."""

    experts: int
    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_bias: bool

    @nn.compact
    def __call__(self, rows: jax.Array, owners: jax.Array, sizes: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(INIT, ("experts", *self.axes))
        shape = (self.experts, rows.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        y = jax.lax.ragged_dot(rows, kernel.astype(self.dtype), sizes)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("experts", self.axes[1]))
            bias = self.param("bias", bias_init, (self.experts, self.features), self.param_dtype)
            y = y + bias.astype(self.dtype)[owners]
        return y


def _route(logits: jax.Array, per_token: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """float32 logits [N, experts] -> (weights float32 [N, per_token], experts int32 [N, per_token]).

    A softmax over the chosen logits alone is the softmax over all of them, made to sum to 1.
    """
    if normalize:
        top, chosen = jax.lax.top_k(logits, per_token)
        return jax.nn.softmax(top, axis=-1), chosen
    return jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)


def _inner(spec: DecoderSpec, project) -> jax.Array:
    """The activations between the two projections; project(name, features) makes and applies one."""
    features = spec.intermediate_size
    if spec.gate is None:
        return ACTIVATIONS[spec.hidden_act](project("up_proj", features))
    if spec.gate == "separate":
        gate, up = project("gate_proj", features), project("up_proj", features)
    else:
        both = project("gate_up_proj", 2 * features)
        gate, up = jnp.split(both, 2, axis=-1) if spec.gate == "halves" else (both[..., ::2], both[..., 1::2])
    if spec.swiglu_clamp is None:
        return ACTIVATIONS[spec.hidden_act](gate) * up
    alpha, limit = spec.swiglu_clamp  # GPT-OSS: values beyond the limit are cut, and the linear part is shifted by one
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
