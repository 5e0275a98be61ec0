"""The parametrised pieces of a decoder; each names its parameters' logical axes where it declares them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """y = x W, and + scale (x A) B where the `lora` collection holds adapters for this layer (Hu et al. 2021).

    Parameters: `kernel` [in, features]. Collection `lora` (optional): `lora_a` [in, r], `lora_b` [r, features],
    `lora_scale` scalar.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None  # of y, where products are to be summed and kept in more than `dtype`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = nn.with_logical_partitioning(INIT, self.axes)
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=self.out_dtype)
        if self.has_variable("lora", "lora_a"):
            a, b, scale = (self.get_variable("lora", name) for name in ("lora_a", "lora_b", "lora_scale"))
            y = y + low_rank(x, a.astype(self.dtype), (b * scale).astype(self.dtype))
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019), computed in float32, returned in `dtype`."""

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", scale_init, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embedding(nn.Module):
    """Token embedding [vocab, width], and the tied output head as `attend`."""

    vocab_size: int
    width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        init = nn.with_logical_partitioning(INIT, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width), self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., width]"""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 logits [..., vocab]"""
        return jnp.einsum("...d,vd->...v", x, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)
