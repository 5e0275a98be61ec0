"""The vision tower and its projector: from patches to embeddings among those of tokens.

SigLIP (Zhai et al. 2023, arXiv 2303.15343) as Gemma 3 has it (arXiv 2503.19786, section 2.1), and the ViT of Qwen2.5-VL
(arXiv 2502.13923, section 2.1.1).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ftjax.models.attention import MASKED
from ftjax.models.layers import ACTIVATIONS, INIT, NORMS, Linear, RMSNorm
from ftjax.models.remat import REMAT_POLICIES
from ftjax.models.rope import rotate
from ftjax.models.spec import Vision
from ftjax.models.vision import Images
from ftjax.sharding import constrain

BLOCK = 256  # queries at a time
SCORES = 2**22  # of one head and row at a time, in blocks that are computed together


class Tower(nn.Module):
    """Images of any number in each row -> their embeddings.

    Parameters: `patches/weight` [W, 3, p, p], with frames [W, 3, frames, p, p], as Hugging Face has it, and
    `patches/bias` [W]; `positions/embedding` [grid grid, W]; `layers/...`, stacked; `projector/...`.
    """

    vision: Vision
    width: int  # of the decoder
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, images: Images) -> jax.Array:
        """[B, P / merge**2, width], in `dtype`"""
        vision, dtypes = self.vision, (self.dtype, self.param_dtype)
        x = Patches(vision, *dtypes, name="patches")(images.patches)
        places, segments, order = images.places, images.images, None
        if vision.grid is not None:
            x = x + Places(vision, *dtypes, name="positions")(places)
        windows = segments
        if vision.window is not None:
            order, windows = in_windows(vision, places, segments)
            x, places, segments = (_by_tokens(vision, whole, order) for whole in (x, places, segments))
        turned = None if vision.rope_theta is None else _turns(vision, places)
        is_full = np.isin(np.arange(vision.num_hidden_layers), vision.full_layers)
        policy = REMAT_POLICIES[self.remat]
        block = nn.remat(TowerBlock, policy=policy, prevent_cse=False) if policy else TowerBlock
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=vision.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(vision, *dtypes, name="layers")(x, jnp.asarray(is_full), segments, windows, turned)
        x = Projector(vision, self.width, *dtypes, name="projector")(x)
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        return constrain(x, "batch", None, "width")


class Patches(nn.Module):
    """The product that takes patches in: a convolution whose windows do not overlap."""

    vision: Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """uint8 [B, P, 3 p p] -> [B, P, W]"""
        vision = self.vision
        batch, count, _ = patches.shape
        colors = patches.astype(jnp.float32).reshape(batch, count, 3, -1) / 255
        mean, std = (jnp.asarray(values, jnp.float32)[:, None] for values in (vision.mean, vision.std))
        x = ((colors - mean) / std).reshape(batch, count, -1).astype(self.dtype)
        frames = (vision.frames,) if vision.frames > 1 else ()
        shape = (vision.hidden_size, 3, *frames, vision.patch, vision.patch)
        init = nn.with_logical_partitioning(INIT, ("embed", *[None] * (len(shape) - 1)))
        weight = self.param("weight", init, shape, self.param_dtype)
        if frames:  # that are all alike
            weight = weight.astype(jnp.float32).sum(axis=2)
        x = x @ weight.reshape(vision.hidden_size, -1).astype(self.dtype).T
        if vision.patch_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            x = x + self.param("bias", init, (vision.hidden_size,), self.param_dtype).astype(self.dtype)
        return constrain(x, "batch", None, "width")


class Places(nn.Module):
    """An embedding of each place in an image, `embedding` [grid grid, W]."""

    vision: Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, places: jax.Array) -> jax.Array:
        """int32 [B, P, 2] -> [B, P, W]"""
        grid = self.vision.grid
        init = nn.with_logical_partitioning(INIT, (None, "embed"))
        table = self.param("embedding", init, (grid * grid, self.vision.hidden_size), self.param_dtype)
        return jnp.take(table, places[..., 0] * grid + places[..., 1], axis=0, mode="clip").astype(self.dtype)


class TowerBlock(nn.Module):
    """One layer, shaped for `nn.scan`."""

    vision: Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, is_full, images, windows, turned):
        """x [B, P, W]; is_full: bool scalar, whether this layer sees the whole image; images, windows int32 [B, P], by
        what patches lie in; turned: cosines and sines float32 [B, P, pairs], or None.
        """
        vision, dtypes = self.vision, (self.dtype, self.param_dtype)

        def linear(name, features, axes, x):
            return Linear(features, axes, *dtypes, use_bias=True, name=name)(x)

        def norm(name, x):
            return NORMS[vision.norm](vision.norm_eps, *dtypes, name=name)(x)

        x = checkpoint_name(constrain(x, "batch", None, "width"), "layer_input")
        x = x + TowerAttention(vision, *dtypes, name="self_attn")(norm("norm1", x), is_full, images, windows, turned)
        x = x + TowerMLP(vision, *dtypes, name="mlp")(norm("norm2", x))
        return constrain(x, "batch", None, "width"), None


class TowerMLP(nn.Module):
    vision: Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        vision, options = self.vision, (self.dtype, self.param_dtype, None, True)
        act = ACTIVATIONS[vision.hidden_act]
        up = Linear(vision.intermediate_size, ("embed", "mlp"), *options, name="up_proj")(x)
        if vision.gated:
            up = act(Linear(vision.intermediate_size, ("embed", "mlp"), *options, name="gate_proj")(x)) * up
        else:
            up = act(up)
        return Linear(vision.hidden_size, ("mlp", "embed"), *options, name="down_proj")(up)


class TowerAttention(nn.Module):
    vision: Vision
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, is_full, images, windows, turned):
        vision, options = self.vision, (self.dtype, self.param_dtype, None, True)
        heads = vision.num_attention_heads
        if vision.fused_qkv:
            fused = Linear(3 * vision.hidden_size, ("embed", "heads"), *options, name="qkv_proj")(x)
            parts = jnp.split(fused, 3, axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            parts = [Linear(vision.hidden_size, ("embed", "heads"), *options, name=name)(x) for name in names]
        queries, keys, values = (part.reshape(*x.shape[:2], heads, -1) for part in parts)
        if turned is not None:
            queries, keys = (rotate(part, *turned) for part in (queries, keys))
        whole = functools.partial(within, segments=images, most=None if vision.grid is None else vision.grid**2)
        if vision.window is None:
            out = whole(queries, keys, values)
        else:
            windowed = functools.partial(within, segments=windows, most=vision.window**2)
            out = jax.lax.cond(is_full, whole, windowed, queries, keys, values)
        return Linear(vision.hidden_size, ("heads", "embed"), *options, name="o_proj")(out.reshape(x.shape))


class Projector(nn.Module):
    """Of merge x merge patches one token of the decoder's width."""

    vision: Vision
    width: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, W] -> [B, P / merge**2, width]"""
        vision, dtypes = self.vision, (self.dtype, self.param_dtype)
        batch, count, inner = x.shape
        x = NORMS[vision.norm](vision.norm_eps, *dtypes, name="norm")(x)
        x = x.reshape(batch, count // vision.merge**2, vision.merge**2, inner)
        if vision.projector == "mean":
            x = RMSNorm(vision.norm_eps, *dtypes, plus_one=True, name="mean_norm")(x.mean(axis=2))
            init = nn.with_logical_partitioning(INIT, ("embed", None))
            # No kernel of a linear layer to Hugging Face, and so not to adapters.
            return x @ self.param("weight", init, (inner, self.width), self.param_dtype).astype(self.dtype)
        x, wide = x.reshape(batch, x.shape[1], -1), vision.merge**2 * inner
        x = Linear(wide, ("embed", "mlp"), *dtypes, use_bias=True, name="up_proj")(x)
        x = ACTIVATIONS["gelu"](x)
        return Linear(self.width, ("mlp", "embed"), *dtypes, use_bias=True, name="down_proj")(x)


def within(queries: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array, most: int | None) -> jax.Array:
    """Attention of every patch to all of its segment; softmax in float32.

    queries, keys, values [B, P, H, d]; segments int32 [B, P], whose patches lie one after the other, and are not more
    than `most`. A block of queries sees no keys further off; the backward pass makes its scores again.
    """
    batch, count, heads, width = queries.shape
    most = count if most is None else min(most, count)
    block = min(BLOCK, most)
    span, blocks = min(count, 2 * (most - 1) + block), -(-count // block)
    # Of blocks that do not fill the last one, the last patches are computed twice.
    starts = jnp.minimum(jnp.arange(blocks) * block, count - block)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(start):
        first = jnp.clip(start - (most - 1), 0, count - span)
        own, own_segments = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (queries, segments))
        seen = [jax.lax.dynamic_slice_in_dim(x, first, span, axis=1) for x in (keys, values, segments)]
        own = own * jnp.asarray(width**-0.5, own.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", own, seen[0], preferred_element_type=jnp.float32)
        same = own_segments[:, None, :, None] == seen[2][:, None, None, :]
        weights = jax.nn.softmax(jnp.where(same, scores, MASKED), axis=-1).astype(values.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, seen[1])

    if blocks == 1:
        return of_block(starts[0])
    together = max(1, SCORES // (block * span))
    out = jax.lax.map(of_block, starts, batch_size=min(together, blocks)).swapaxes(0, 1)  # [B, blocks, block, H, d]
    last = count - (blocks - 1) * block  # patches of the last block that are in no other
    whole = out[:, :-1].reshape(batch, -1, heads, width)
    return jnp.concatenate([whole, out[:, -1, block - last :]], axis=1)


def in_windows(vision: Vision, places: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int32 [B, P / merge**2]: tokens in an order in which those of a window lie together, images one after the other
    as they did; int32 [B, P]: 1, 2, ... by the window of each patch in that order, 0 for padding)
    """
    each = vision.merge**2
    image = images[:, ::each]
    row, column = (places[:, ::each, axis] // vision.window for axis in (0, 1))
    image = jnp.where(image > 0, image, images.shape[1] + 1)  # padding last
    order = jnp.lexsort((column, row, image), axis=-1)
    keys = jnp.stack([jnp.take_along_axis(key, order, axis=1) for key in (image, row, column)], axis=-1)
    begins = (keys[:, 1:] != keys[:, :-1]).any(axis=-1)
    windows = 1 + jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    windows = jnp.where(keys[..., 0] > images.shape[1], 0, windows)
    return order, jnp.repeat(windows, each, axis=1)


def _by_tokens(vision: Vision, x: jax.Array, order: jax.Array) -> jax.Array:
    """x [B, P, ...], of a token's patches together in another order of tokens, int32 [B, P / merge**2]."""
    apart = x.reshape(x.shape[0], order.shape[1], -1)
    return jnp.take_along_axis(apart, order[..., None], axis=1).reshape(x.shape)


def _turns(vision: Vision, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE in two dimensions, float32 [B, P, pairs]."""
    half = vision.hidden_size // vision.num_attention_heads // 2  # of a head: rows turn half of its pairs
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1) / np.float32(vision.rope_theta) ** exponents
    angles = places[..., None].astype(jnp.float32) * jnp.asarray(frequencies)  # [B, P, 2, pairs / 2]
    angles = angles.reshape(*places.shape[:2], -1)
    return jnp.cos(angles), jnp.sin(angles)
