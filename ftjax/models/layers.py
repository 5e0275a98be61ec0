"""The parametrised pieces of a decoder; each names its parameters' logical axes where it declares them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# By their names in Hugging Face configs.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,  # the tanh approximation (Hendrycks and Gimpel 2016)
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}

INIT = nn.initializers.normal(0.02)


@jax.custom_vjp
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x A) B: x [..., in], a [in, r], b [r, out] -> [..., out].

    Its gradient is written out so that each product has its narrow operand on the left. In the order that JAX derives,
    XLA on CPUs transposes the wide ones first, which costs more than the products.
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


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Linear(nn.Module):
    """y = x W + b, and + scale (x A) B where the `lora` collection holds adapters for this layer (Hu et al. 2021).

    Parameters: `kernel` [in, features], with use_bias `bias` [features]. Collection `lora` (optional):
    `lora_a` [in, r], `lora_b` [r, features], `lora_scale` scalar.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None  # of y, where products are to be summed and kept in more than `dtype`
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(INIT, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=self.out_dtype)
        if self.has_variable("lora", "lora_a"):
            a, b, scale = (self.get_variable("lora", name) for name in ("lora_a", "lora_b", "lora_scale"))
            y = y + low_rank(x, a.astype(self.dtype), (b * scale).astype(self.dtype))
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],))
            y = y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019), computed in float32, returned in `dtype`.

    plus_one: the factor is 1 + scale, and multiplied in float32 too, as in Gemma.
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(init, ("norm",)), (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        if self.plus_one:
            return (x * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias (Ba et al. 2016), computed in float32, returned in `dtype`."""

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def vector(name, init):
            init = nn.with_logical_partitioning(init, ("norm",))
            return self.param(name, init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)

        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = vector("scale", nn.initializers.ones), vector("bias", nn.initializers.zeros)
        return (x * scale + bias).astype(self.dtype)


class Embedding(nn.Module):
    """An embedding [rows, width] of tokens or positions, and the tied output head as `attend`."""

    rows: int
    width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    row_axis: str | None = "vocab"

    def setup(self):
        init = nn.with_logical_partitioning(INIT, (self.row_axis, "embed"))
        self.embedding = self.param("embedding", init, (self.rows, self.width), self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., width]"""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 logits [..., rows]"""
        return jnp.einsum("...d,vd->...v", x, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)
