"""Kernels stored in 8 or 4 bits: int8 per output channel, and NF4 in blocks with doubly quantized scales; or in 16.

A quantized kernel [..., in, out] is a dict of arrays in the `quant` collection, at the path that the kernel itself
would have in `params`. It stays packed; `dequantize` unpacks it inside the layer that uses it.

    int8: `int8` int8 [..., in, out], `scale` float32 [..., out]
    panels: `panels` uint16 [layers, out / 16, in / 2, 16, 2], the bits of bfloat16 values of all layers, in the order
      in which CPUs multiply them, and `layer` int32, which of them
    nf4:  `nf4` uint8 [..., in / 2, out], `absmax` uint8 [..., in / 64, out],
          `absmax_scale` float32 [..., groups], `absmax_offset` float32 [..., 1]

NF4 is that of QLoRA (Dettmers et al. 2023, section 3 and appendix E) with the constants of bitsandbytes: 0.516 bytes
per parameter. Blocks run along the inputs of each output channel, as they do there in a [out, in] weight.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.errors import UserError
from ftjax.tree import Tree

KINDS = ("int8", "nf4")
BLOCK = 64  # weights that share an absmax
GROUP = 256  # absmaxes that share a scale
_TINY = np.float32(1.2e-38)  # a divisor instead of 0; anything smaller is flushed to 0

# The 16 codes: quantiles of a normal distribution, one of them exactly zero.
# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on


@functools.cache
def dynamic_code() -> np.ndarray:
    """float32 [256], sorted: the dynamic 8-bit code of the absmaxes (Dettmers 2016, "dynamic tree" quantization).

    A sign, an exponent of ten, and a fraction with the bits that the exponent leaves.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        # From both ends with a step rounded to float32, like the original: linspace would differ in the last bit.
        count = 2**exponent
        first, i = np.float32(0.1), np.arange(count + 1)
        step = np.float64((np.float32(1) - first) / np.float32(count))
        bounds = np.where(i < (count + 1) // 2, first + step * i, 1 - step * (count - i))
        bounds = bounds.astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = (np.float64(10.0) ** (exponent - 6)).astype(np.float32) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def shapes(kind: str, kernel: tuple[int, ...], path: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of the arrays that replace a kernel of shape [..., in, out].

    Raises UserError that names `path` if `in` is not a multiple of NF4's block.
    """
    *lead, rows, columns = kernel
    if kind == "int8":
        return {"int8": (kernel, np.dtype(np.int8)), "scale": ((*lead, columns), np.dtype(np.float32))}
    if rows % BLOCK:
        raise UserError(
            f"quantize.base=nf4: the {rows} inputs of {path} are not a multiple of {BLOCK}; use quantize.base=int8"
        )
    groups = -(-(rows // BLOCK * columns) // GROUP)
    return {
        "nf4": ((*lead, rows // 2, columns), np.dtype(np.uint8)),
        "absmax": ((*lead, rows // BLOCK, columns), np.dtype(np.uint8)),
        "absmax_scale": ((*lead, groups), np.dtype(np.float32)),
        "absmax_offset": ((*lead, 1), np.dtype(np.float32)),
    }


def axes(kind: str, kernel: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
    """{name: logical axes} of the same arrays, from the kernel's axes: what can be split is split like the kernel."""
    *lead, _, columns = kernel
    if kind == "int8":
        return {"int8": kernel, "scale": (*lead, columns)}
    return {"nf4": kernel, "absmax": kernel, "absmax_scale": (*lead, None), "absmax_offset": (*lead, None)}


def abstract(
    kind: str, kernels: dict[str, tuple[int, ...]], kernel_axes: dict[str, tuple[str | None, ...]], mesh: Mesh
) -> Tree:
    """The `quant` collection for kernels {path: shape} as ShapeDtypeStructs with shardings."""
    out = {}
    for path, kernel in kernels.items():
        module = path.rpartition("/")[0]
        logical = axes(kind, kernel_axes[path])
        for name, (shape, dtype) in shapes(kind, kernel, module).items():
            layout = sharding.named(mesh, logical[name], shape)
            out[f"{module}/{name}"] = jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    return tree.unflatten(out)


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """The arrays of one kernel [in, out], computed in float32 and rounded to the nearest code."""
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(kernel), axis=0) / 127
        return {"int8": jnp.round(kernel / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), "scale": scale}
    rows, columns = kernel.shape
    blocks = kernel.reshape(rows // BLOCK, BLOCK, columns)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * (1 / jnp.maximum(absmax, _TINY))[:, None]
    codes = _nearest(scaled, NF4).reshape(rows // 2, 2, columns)
    offset = absmax.mean()
    # Groups run through the blocks of one output channel, then of the next.
    flat = (absmax - offset).T.reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)
    group_scale = jnp.max(jnp.abs(padded), axis=1)
    scaled = (padded * (1 / jnp.maximum(group_scale, _TINY))[:, None]).reshape(-1)[: flat.size]
    return {
        "nf4": codes[:, 0] << 4 | codes[:, 1],
        "absmax": _nearest(scaled, dynamic_code()).reshape(columns, -1).T,
        "absmax_scale": group_scale,
        "absmax_offset": offset[None],
    }


STACKS = "stacks"  # the collection of what each layer reads whole: `panels`


def panels(kernel: jax.Array) -> jax.Array:
    """[layers, in, out], in even and out a multiple of 16 -> uint16 [layers, out / 16, in / 2, 16, 2] of bfloat16."""
    bits = jax.lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16)
    layers, inner, out = bits.shape
    return bits.reshape(layers, inner // 2, 2, out // 16, 16).transpose(0, 3, 1, 4, 2)


def dequantize(packed: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The kernel [..., in, out] of the arrays `packed`, computed in float32."""
    if "a_panels" in packed:
        raise ValueError("a kernel with its adapter in panels is multiplied by onednn.product_with_layer alone")
    if "panels" in packed:
        its = packed["panels"][packed["layer"]]
        its = its.transpose(1, 3, 0, 2).reshape(2 * its.shape[1], 16 * its.shape[0])
        return jax.lax.bitcast_convert_type(its, jnp.bfloat16).astype(dtype)
    if "int8" in packed:
        return (packed["int8"].astype(jnp.float32) * packed["scale"][..., None, :]).astype(dtype)
    *lead, blocks, columns = packed["absmax"].shape
    channel, block = jnp.arange(columns), jnp.arange(blocks)
    group = (channel[None, :] * blocks + block[:, None]) // GROUP
    absmax = jnp.asarray(dynamic_code())[packed["absmax"]] * packed["absmax_scale"][..., group]
    absmax = absmax + packed["absmax_offset"][..., None]
    codes = jnp.stack([packed["nf4"] >> 4, packed["nf4"] & 15], axis=-2)  # [..., in / 2, 2, out]
    values = jnp.asarray(NF4)[codes].reshape(*lead, blocks, BLOCK, columns)
    return (values * absmax[..., :, None, :]).reshape(*lead, blocks * BLOCK, columns).astype(dtype)


def is_packed(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a quantized kernel."""
    return any(name in names for name in ("int8", "nf4", "panels"))


def count(packed: Tree) -> int:
    """The number of parameters that a `quant` collection stands for."""
    per_code = {"int8": 1, "nf4": 2}
    leaves = ((path.rpartition("/")[2], leaf) for path, leaf in tree.flatten(packed).items())
    return sum(leaf.size * per_code[name] for name, leaf in leaves if name in per_code)


def _nearest(values: jax.Array, code: np.ndarray) -> jax.Array:
    """uint8: for each value the index of the nearest entry of the sorted `code`; a tie goes to the lower one."""
    middles = jnp.asarray((code[:-1] + code[1:]) / 2)
    if code.size > 16:
        return jnp.searchsorted(middles, values, side="left").astype(jnp.uint8)
    index = jnp.zeros(values.shape, jnp.uint8)
    for middle in middles:  # sixteen comparisons vectorize, a search does not
        index += (values > middle).astype(jnp.uint8)
    return index


def kernel(variables: Tree, module: str) -> jax.Array:
    """The kernel [..., in, out] of a module, whole, however it is stored."""
    leaves = tree.flatten(variables)
    if f"params/{module}/kernel" in leaves:
        return leaves[f"params/{module}/kernel"]
    prefix = f"quant/{module}/"
    packed = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    return jax.jit(dequantize, static_argnums=1)(packed, jnp.float32)


def whole_params(variables: Tree, dtype: jnp.dtype) -> Tree:
    """`params` with every quantized kernel made whole, in `dtype`: the base that the adapters were trained on."""
    leaves = tree.flatten(variables["params"])
    for module in {path.rpartition("/")[0] for path in tree.flatten(variables.get("quant", {}))}:
        leaves[f"{module}/kernel"] = kernel(variables, module).astype(dtype)
    return tree.unflatten(leaves)
