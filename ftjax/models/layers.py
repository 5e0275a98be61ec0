"""The parametrized pieces of a decoder; each names its parameters' logical axes where it declares them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ftjax import quant
from ftjax.models import onednn
from ftjax.models.adapter import adapt, by_row, is_plain
from ftjax.sharding import constrain


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0) ** 2 (So et al. 2021)"""
    return jnp.square(nn.relu(x))


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """Huang and Schlag 2024, of the scalars that `Xielu` holds; in float32, returned in x's dtype."""
    wide, positive = x.astype(jnp.float32), jax.nn.softplus
    above = positive(alpha_p) * wide * wide
    below = (jnp.expm1(jnp.minimum(wide, eps)) - wide) * (beta + positive(alpha_n))
    return (jnp.where(wide > 0, above, below) + beta * wide).astype(x.dtype)


# By their names in Hugging Face configs.
ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,  # the tanh approximation (Hendrycks and Gimpel 2016)
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "relu2": relu_squared,
    "xielu": xielu,
}

INIT = nn.initializers.normal(0.02)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x * factor, in x's dtype."""
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


# The backward pass computes again what such a function does instead of keeping what it leaves on its way: for
# elementwise work on wide arrays that is less than moving them to and from memory.
remade = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [..., in] @ kernel [in, out], summed and returned in a `dtype` wider than theirs.

    The gradient of the result is rounded to their dtype before it is multiplied, as where the result itself is of that
    dtype: products of two dtypes are several times slower on GPUs.
    """
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _wide_product_forward(x, kernel, dtype):
    return wide_product(x, kernel, dtype), (x, kernel)


def _wide_product_backward(dtype, saved, gradient):
    return jax.vjp(jnp.matmul, *saved)[1](gradient.astype(saved[0].dtype))


wide_product.defvjp(_wide_product_forward, _wide_product_backward)


def packed_kernel(module: nn.Module) -> dict[str, jax.Array]:
    """The arrays of `module`'s quantized kernel, {} if it has none."""
    return dict(module.variables.get("quant", {})) | dict(module.variables.get(quant.STACKS, {}))


class Linear(nn.Module):
    """y = x W + b, and what adapter.py adds where the `lora` collection holds an adapter for this layer.

    Parameters: `kernel` [in, features], with use_bias `bias` [features]. Collection `quant` (optional): what stands for
    `kernel` when that is quantized (see quant.py).
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    out_dtype: jnp.dtype | None = None  # of y, where products are to be summed and kept in more than `dtype`
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, token_index: jax.Array | None = None, rng: jax.Array | None = None) -> jax.Array:
        """x [..., in], of any float dtype -> [..., features], in `out_dtype` or else `dtype`.

        token_index int32 [...] and rng, a PRNG key, are for the dropout of an adapter, see `adapter.adapt`; without rng
        it is this layer's own, of the "dropout" stream.
        """
        if packed := packed_kernel(self):
            kernel = functools.partial(quant.dequantize, packed)

            # The backward pass makes the kernel whole once more instead of keeping it.
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def multiply(x, packed):
                if onednn.in_use() and "layer" in packed:
                    return onednn.product_with_layer(x, **packed, dtype=self.out_dtype or self.dtype)
                if onednn.in_use():
                    whole = quant.dequantize(packed, onednn.operands())
                    return onednn.product(x, whole, self.out_dtype or self.dtype)
                return jnp.matmul(x, quant.dequantize(packed, self.dtype), preferred_element_type=self.out_dtype)

            product = functools.partial(multiply, packed=packed)
        else:
            kernel_init = nn.with_logical_partitioning(INIT, self.axes)
            whole = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
            kernel = whole.astype

            def product(x):
                if onednn.in_use():
                    return onednn.product(x, whole, self.out_dtype or self.dtype)
                if self.out_dtype is None:
                    return x @ kernel(self.dtype)
                return wide_product(x, kernel(self.dtype), self.out_dtype)

        lora = self.variables.get("lora")
        if lora and rng is None and self.has_rng("dropout"):
            rng = self.make_rng("dropout")
        if lora and not packed and onednn.in_use() and is_plain(lora, rng):
            b = lora["lora_b"] * lora["lora_scale"]
            y = onednn.adapted(x, whole, lora["lora_a"], b, self.out_dtype or self.dtype)
        else:
            y = product(x)
            y = adapt(lora, x, y, product, kernel, rng, token_index) if lora else y
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],))
            y = y + self.param("bias", bias_init, (self.features,), self.param_dtype).astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019), computed in float32, returned in `dtype`.

    plus_one: the factor is 1 + scale, and multiplied in float32 too, as in Gemma. wide: multiplied in float32 without
    the 1, as in Gemma 3n and 4; use_scale: without it there is no factor.
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    plus_one: bool = False
    wide: bool = False
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros if self.plus_one else nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype) if self.use_scale else None

        @remade
        def normed(x, scale):
            x = x.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
            if scale is None:
                return x.astype(self.dtype)
            if self.plus_one or self.wide:
                scale = scale.astype(jnp.float32)
                return (x * (1.0 + scale if self.plus_one else scale)).astype(self.dtype)
            return x.astype(self.dtype) * scale.astype(self.dtype)

        return normed(x, scale)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias (Ba et al. 2016), computed in float32, returned in `dtype`.

    use_scale, use_bias: without these it multiplies by 1 and adds 0; plus_one: the factor is 1 + scale, as in Nemotron;
    per_head: x [..., heads, d] has a scale for each head, [heads, d].
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_scale: bool = True
    use_bias: bool = True
    plus_one: bool = False
    per_head: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-2:] if self.per_head else x.shape[-1:]

        def vector(name, init):
            init = nn.with_logical_partitioning(init, ("norm",) * len(shape))
            return self.param(name, init, shape, self.param_dtype).astype(jnp.float32)

        initial = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = vector("scale", initial) if self.use_scale else 1.0
        bias = vector("bias", nn.initializers.zeros) if self.use_bias else 0.0

        @remade
        def normed(x, scale, bias):
            x = x.astype(jnp.float32)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
            return (x * (1.0 + scale if self.plus_one else scale) + bias).astype(self.dtype)

        return normed(x, scale, bias)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "rms_plus_one": functools.partial(RMSNorm, plus_one=True),
    "rms_wide": functools.partial(RMSNorm, wide=True),
    "rms_bare": functools.partial(RMSNorm, use_scale=False),
    "layer": LayerNorm,
    "layer_plus_one": functools.partial(LayerNorm, plus_one=True),
    "layer_scale": functools.partial(LayerNorm, use_bias=False),
    "layer_bare": functools.partial(LayerNorm, use_scale=False, use_bias=False),
    "layer_heads": functools.partial(LayerNorm, use_bias=False, per_head=True),
}


class Xielu(nn.Module):
    """The scalars of `xielu`: `alpha_p` and `alpha_n` [1], which are learned, `beta` and `eps` [], which are not.

    The latter two are parameters because checkpoints have them.
    """

    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[jax.Array, ...]:
        """The four in this order, float32."""

        def scalar(name, shape, value):
            init = nn.with_logical_partitioning(nn.initializers.constant(value), ("norm",) * len(shape))
            return self.param(name, init, shape, self.param_dtype).astype(jnp.float32)

        # The inverse of softplus of 0.8, and of 0.8 - beta: what transformers starts from.
        learned = scalar("alpha_p", (1,), 0.2034), scalar("alpha_n", (1,), -1.0502)
        return *learned, *map(jax.lax.stop_gradient, (scalar("beta", (), 0.5), scalar("eps", (), -1e-6)))


class Embedding(nn.Module):
    """An embedding [rows, width] of tokens or positions, and the tied output head as `attend`."""

    rows: int
    width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    row_axis: str | None = "vocab"

    def setup(self):
        init = nn.with_logical_partitioning(INIT, (self.row_axis, "table"))
        self.embedding = self.param("embedding", init, (self.rows, self.width), self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, width], with `lora_a` [rows, r] and `lora_b` [r, width] where there is an adapter"""
        # Looked up where the table's parts of the width are; then each device gets the whole width of its own rows.
        tokens = constrain(tokens, "replica", "length")
        found = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        found = constrain(found, "replica", "length", "table")
        lora = self.variables.get("lora", {})
        if "lora_row" in lora:
            rows = jnp.maximum(lora["lora_row"], 0)
            return by_row(lora, lora["lora_a"][rows[:, None], tokens].astype(self.dtype), found)
        if lora:
            inner = jnp.take(lora["lora_a"], tokens, axis=0).astype(self.dtype)
            found = found + inner @ (lora["lora_b"] * lora["lora_scale"]).astype(self.dtype)
        return found

    def attend(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 logits [..., rows]"""
        if onednn.in_use():
            packed = packed_kernel(self)
            if packed:
                return onednn.product_with_layer(x, **packed, dtype=jnp.float32)
            return onednn.product(x, self.embedding, jnp.float32, turned=True)
        return wide_product(x, self.embedding.astype(self.dtype).T, jnp.float32)
