"""A mixture of experts beside a dense MLP, each under norms of its own, and summed (Gemma 4)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax.models.layers import NORMS, Linear
from ftjax.models.mlp import MLP, Experts
from ftjax.models.routing import note, route
from ftjax.models.spec import DecoderSpec


def mixture_beside(
    spec: DecoderSpec,
    dtypes: tuple[jnp.dtype, jnp.dtype],
    x: jax.Array,
    normed: jax.Array,
    segment_ids: jax.Array,
    block: int | None,
) -> jax.Array:
    """What both make of x [B, T, D], which the dense MLP gets `normed`; to be called where a layer makes its modules.

    block: as of MLP. Names of modules are Hugging Face's. Returns [B, T, D].
    """

    def norm(name: str, x: jax.Array) -> jax.Array:
        return NORMS[spec.norm](spec.norm_eps, *dtypes, name=name)(x)

    alone = dataclasses.replace(spec, intermediate_size=spec.experts.shared, experts=None)
    dense = MLP(alone, *dtypes, block=block, name="mlp")(normed)
    weights, chosen = ScaledRouter(spec, *dtypes, name="router")(x, segment_ids)
    sparse = Experts(spec, *dtypes, name="experts")(norm("pre_feedforward_layernorm_2", x), weights, chosen)
    return norm("post_feedforward_layernorm_1", dense) + norm("post_feedforward_layernorm_2", sparse)


class ScaledRouter(nn.Module):
    """Chooses experts by normed, scaled inputs, and multiplies the weight of each by a number that is learned."""

    spec: DecoderSpec
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], segment_ids int32 [B, T] -> weights float32 and experts int32 [B, T, per_token]"""
        spec, experts, dtypes = self.spec, self.spec.experts, (self.dtype, self.param_dtype)

        def vector(name: str, width: int) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
            return self.param(name, init, (width,), self.param_dtype)

        x = NORMS["rms_bare"](spec.norm_eps, *dtypes)(x)
        x = x * vector("scale", spec.hidden_size).astype(self.dtype) * jnp.asarray(spec.hidden_size**-0.5, self.dtype)
        logits = Linear(experts.count, ("embed", None), *dtypes, out_dtype=jnp.float32, name="proj")(x)
        weights, chosen = route(logits, experts)
        note(self, logits, chosen, experts, segment_ids)
        return weights * vector("per_expert_scale", experts.count).astype(jnp.float32)[chosen], chosen
