"""Matrix products by oneDNN on CPUs: of values rounded to bfloat16 where the CPU has instructions for that, else of
float32, summed in float32.

XLA multiplies bfloat16 on CPUs no faster than float32; CPUs with instructions for it are twice as fast. oneDNN uses
them. Where there are none, what is gained is that products which belong together are made in the cache. `onednn.cc`
hands oneDNN XLA's buffers, and is compiled when it is first used, since it depends on the jaxlib at hand.
"""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from ftjax import cache
from ftjax.errors import UserError

log = logging.getLogger(__name__)

EXTRA = "pip install 'ftjax[onednn]'"
_PRODUCT, _WITH_LAYER, _SUM = "ftjax_product", "ftjax_product_with_layer", "ftjax_sum_of_two"
# See onednn_attention.py.
ATTENTION, ATTENTION_GRADIENTS, OF_NEXT_TOKEN = "ftjax_attention", "ftjax_attention_gradients", "ftjax_of_next_token"
# The first is compiled.
_SOURCES = ("onednn.cc", "onednn.h", "onednn_attention.h", "onednn_next_token.h", "onednn_panels.h")
_LIBRARY, _HEADERS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp")
# By what is multiplied. Every CPU with instructions for products of bfloat16 has the others.
_INSTRUCTIONS = {
    jnp.dtype("bfloat16"): ("-DFTJAX_BFLOAT16", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "bf16"))),
    jnp.dtype("float32"): ("-mavx2", "-mfma"),
}
_HERE = Path(__file__).parent
_used = contextvars.ContextVar("matrix products by oneDNN", default=False)


@contextlib.contextmanager
def used(wanted: bool) -> Iterator[None]:
    """What is traced inside multiplies by oneDNN, if `wanted`."""
    token = _used.set(wanted)
    try:
        yield
    finally:
        _used.reset(token)


def in_use() -> bool:
    return _used.get()


@functools.cache
def lacks() -> str:
    """What is missing on this machine, with the remedy if there is one; "" if products by oneDNN are to be had."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"oneDNN is used on Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    if not {"avx2", "fma"} <= _cpu_flags():
        return "this CPU has no instructions of AVX2 (avx2, fma)"
    for name in (_LIBRARY, _HEADERS):
        if not any(importlib.metadata.distributions(name=name)):
            return f"{name} is not installed: {EXTRA}"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler {_compiler()[0]}: install g++, or name another one in CXX"
    return ""


@functools.cache
def operands() -> jnp.dtype:
    """What values are rounded to before this CPU multiplies them: bfloat16 or float32, which they all are already."""
    return jnp.dtype("bfloat16" if "avx512_bf16" in _cpu_flags() else "float32")


def choose(wanted: str, platform: str, count: int) -> tuple[str, str]:
    """("xla" or "onednn", why it is not the latter where it might have been) for config.model.matmul.

    platform, count: of the devices of the mesh, see `sharding.platform`.
    """
    if wanted == "xla":
        return wanted, ""
    alone = (platform, count) == ("cpu", 1)
    reason = _fault() if alone else f"oneDNN is for one CPU, and these are {count} devices ({platform})"
    return ("xla" if reason else "onednn"), reason


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, turned: bool = False) -> jax.Array:
    """x [..., in] @ kernel [in, out], turned: x @ kernel.T of a kernel [out, in] -> `dtype` [..., out].

    x and kernel have any float dtype and become `operands()`, and so does the gradient of the result.
    """
    load()
    return _product(x, kernel, jnp.dtype(dtype), turned)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, dtype, turned):
    out = _multiply(_rows(x), kernel, dtype, right_turned=turned)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _forward(x, kernel, dtype, turned):
    # Kept as they came: others keep the same x, and of its rounded copy each would keep its own.
    return _product(x, kernel, dtype, turned), (x, kernel)


def _backward(dtype, turned, saved, gradient):
    x, kernel = saved
    rows, left = _rows(x), _rows(gradient)
    d_x = _multiply(left, kernel, x.dtype, right_turned=not turned).reshape(x.shape)
    pair = (left, rows) if turned else (rows, left)
    return d_x, _multiply(*pair, kernel.dtype, left_turned=True)


_product.defvjp(_forward, _backward)


def product_with_layer(
    x: jax.Array,
    panels: jax.Array,
    layer: jax.Array,
    dtype: jnp.dtype,
    a_panels: jax.Array | None = None,
    b_panels: jax.Array | None = None,
) -> jax.Array:
    """`product` of x [..., in] with the kernel of one layer, read where it lies among those of all; without gradients.

    panels: uint16 [layers, out / 16, in / 2, 16, 2], see `quant.panels`; layer: int32, a scalar. a_panels, b_panels:
    those of A [layers, in, r] and B [layers, r, out], of which (x A) B is added, as in `adapted`. Rows of zeros have
    zeros, whatever the kernel, and cost nothing.
    """
    load()
    rows, shape = _rows(x), (*x.shape[:-1], 16 * panels.shape[1])
    if x.shape[-1] != 2 * panels.shape[2]:
        raise ValueError(f"{x.shape} and kernels with {2 * panels.shape[2]} inputs have no product")
    if 0 in rows.shape:
        return jnp.zeros(shape, dtype)
    layers, count, pairs = panels.shape[:3]
    if a_panels is None:
        a_panels = jnp.zeros((layers, 0, pairs, 16, 2), jnp.uint16)
        b_panels = jnp.zeros((layers, count, 0, 16, 2), jnp.uint16)
    of_rank = a_panels.shape[1]
    if (a_panels.shape[:3], b_panels.shape[:3]) != ((layers, of_rank, pairs), (layers, count, 8 * of_rank)):
        raise ValueError(f"an adapter of {a_panels.shape} and {b_panels.shape} does not fit kernels of {panels.shape}")
    result = jax.ShapeDtypeStruct((len(rows), shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(_WITH_LAYER, result, vmap_method="sequential")
    return call(rows.astype(operands()), panels, a_panels, b_panels, layer).reshape(shape).astype(dtype)


def adapted(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [..., in] @ kernel [in, out] + (x @ a [in, r]) @ b [r, out] -> `dtype` [..., out], as `product` each.

    What the adapter adds, and what its gradient adds to that of x, is summed while the result is in the cache.
    """
    load()
    return _adapted(x, kernel, a, b, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _adapted(x, kernel, a, b, dtype):
    return _adapted_forward(x, kernel, a, b, dtype)[0]


def _adapted_forward(x, kernel, a, b, dtype):
    rows = _rows(x)
    inner = _multiply(rows, a, jnp.float32)
    out = _sum_of_two(rows, kernel, inner, b, dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1]), (x, inner, kernel, a, b)


def _adapted_backward(dtype, saved, gradient):
    x, inner, kernel, a, b = saved
    rows, left = _rows(x), _rows(gradient)
    d_inner = _multiply(left, b, jnp.float32, right_turned=True)
    d_x = _sum_of_two(left, kernel, d_inner, a, x.dtype, right_turned=True).reshape(x.shape)
    pairs = (rows, left, kernel), (rows, d_inner, a), (inner, left, b)
    return d_x, *(_multiply(one, other, of.dtype, left_turned=True) for one, other, of in pairs)


_adapted.defvjp(_adapted_forward, _adapted_backward)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _shape(left, right, left_turned, right_turned):
    """Of the product. What it is made by looks at no sizes, and would read beyond the operands."""
    inner = left.shape[not left_turned], right.shape[right_turned]
    if inner[0] != inner[1]:
        raise ValueError(f"{left.shape} and {right.shape} have no product: {inner[0]} and {inner[1]} differ")
    return left.shape[left_turned], right.shape[not right_turned]


def _multiply(left, right, dtype, left_turned=False, right_turned=False):
    """left [m, k] ([k, m] if turned) @ right [k, n] ([n, k] if turned) -> [m, n], float32 or bfloat16."""
    shape = _shape(left, right, left_turned, right_turned)
    if 0 in (*left.shape, *right.shape):
        return jnp.zeros(shape, dtype)
    result = jnp.bfloat16 if dtype == operands() == jnp.bfloat16 else jnp.float32
    call = jax.ffi.ffi_call(_PRODUCT, jax.ShapeDtypeStruct(shape, result), vmap_method="sequential")
    turned = {"left_turned": np.bool_(left_turned), "right_turned": np.bool_(right_turned)}
    return call(left.astype(operands()), right.astype(operands()), **turned).astype(dtype)


def _sum_of_two(left, right, second_left, second_right, dtype, right_turned=False):
    """left @ right + second_left @ second_right, as `_multiply` each, summed in float32."""
    given = [x.astype(operands()) for x in (left, right, second_left, second_right)]
    shape = _shape(left, right, False, right_turned)
    if shape != _shape(second_left, second_right, False, right_turned):
        raise ValueError(f"products of {left.shape} and {second_left.shape} have other shapes")
    if any(0 in x.shape for x in given):
        return jnp.zeros(shape, dtype)
    call = jax.ffi.ffi_call(_SUM, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(*given, right_turned=np.bool_(right_turned)).astype(dtype)


def refusal(reason: str) -> str:
    return f"config.model.matmul='onednn': {reason}; 'auto' takes it only where it is to be had, and 'xla' never"


def load() -> None:
    """What XLA calls is there after it.

    Raises:
      UserError: it cannot be had on this machine.
    """
    if reason := _fault():
        raise UserError(refusal(reason))


def _fault() -> str:
    """What `lacks` says. Or else what XLA calls is compiled and registered, once: what went wrong with it, or ""."""
    return lacks() or _registered()


@functools.cache
def _registered() -> str:
    try:
        built = _built()
    except UserError as error:
        return str(error)
    targets = {_PRODUCT: "Product", _WITH_LAYER: "ProductWithLayer", _SUM: "SumOfTwo"}
    targets |= {ATTENTION: "Attention", ATTENTION_GRADIENTS: "AttentionGradients", OF_NEXT_TOKEN: "OfNextToken"}
    for name, symbol in targets.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(built, f"Ftjax{symbol}")), platform="cpu")
    return ""


def _built() -> ctypes.CDLL:
    sources = [_HERE.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES]
    versions = (jaxlib.__version__, *(importlib.metadata.version(name) for name in (_LIBRARY, _HEADERS)))
    library = _installed(_LIBRARY, "libdnnl.so.3")
    known = "\0".join((*sources, *_flags(), *versions, str(library), shlex.join(_compiler())))
    name = hashlib.sha256(known.encode()).hexdigest()[:24] + ".so"
    path = cache.file("onednn", name, _compile)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # damaged; or made by another system, whose libraries this one has not
        log.warning("%s cannot be loaded (%s); it is made again", path, error)
    path.unlink(missing_ok=True)
    path = cache.file("onednn", name, _compile)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be loaded ({error}); set FTJAX_CACHE to another disk") from error


def _compile(path: Path) -> None:
    path.touch()  # or a directory that cannot be written to would be the compiler's fault
    library = _installed(_LIBRARY, "libdnnl.so.3")
    headers = _installed(_HEADERS, "oneapi/dnnl/dnnl.hpp").parents[2]
    found = [f"-I{jax.ffi.include_dir()}", f"-I{headers}", str(library), f"-Wl,-rpath,{library.parent}"]
    command = [*_compiler(), str(_HERE / _SOURCES[0]), *_flags(), *found, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise UserError(
            f"{shlex.join(_compiler())} cannot compile {_HERE / _SOURCES[0]}: {'; '.join(errors[:3])}; "
            "name another compiler in CXX"
        )


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, *_INSTRUCTIONS[operands()])


def _installed(distribution: str, end: str) -> Path:
    files = importlib.metadata.distribution(distribution).files or ()
    found = next((Path(file.locate()).resolve() for file in files if file.as_posix().endswith(end)), None)
    if found is None:
        raise UserError(f"{distribution} {importlib.metadata.version(distribution)} has no {end}: {EXTRA}")
    return found


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()


def _compiler() -> list[str]:
    """The words of its command: CXX may be one with arguments ("ccache g++"), or a path with spaces."""
    given = os.environ.get("CXX") or "g++"
    return [given] if shutil.which(given) else shlex.split(given) or [given]
