"""RoPE in a GGUF file, both ways: keys for linear and YaRN scaling, tensors of divisors for Llama 3.1 and LongRoPE."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ftjax.weights.gguf.header import Fields, shorten

_YARN_KEYS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
_LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_OTHER_SCALING = ("attn_factor", "alpha", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier")


def read_rope(file: Fields, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of a file in which RoPE rotates whole heads."""
    if file.whole("rope.dimension_count", head_dim) != head_dim:
        raise file.error("RoPE on a part of a head is not supported")
    file.refuse(*(f"rope.scaling.{key}" for key in _OTHER_SCALING), "rope.scale_linear")
    theta = file.real("rope.freq_base", 10_000.0)
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise file.error(f"scaled RoPE twice, by rope_freqs.weight and as {shorten(kind)}, is not supported")
        return _from_factors(file, theta, file.vector("rope_freqs.weight", head_dim // 2))
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind == "none":
        return parameters
    if kind not in ("linear", "yarn"):
        raise file.error(f"RoPE scaled as {shorten(kind)} is not supported")
    parameters |= {"rope_type": kind, "factor": file.real("rope.scaling.factor")}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = file.whole("rope.scaling.original_context_length")
        named = {ours: f"rope.scaling.{theirs}" for ours, theirs in _YARN_KEYS.items()}
        parameters |= {ours: file.real(key) for ours, key in named.items() if file.has(key)}
    return parameters


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: the divisor of each frequency in Llama 3.1's scaling, in llama.cpp's arithmetic."""
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(parameters["rope_theta"]) ** exponents
    turns = parameters["original_max_position_embeddings"] * frequencies.astype(np.float64) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _from_factors(file: Fields, theta: float, factors: np.ndarray) -> dict[str, Any]:
    """The `llama3` parameters that a file's divisors were made from; the file holds nothing else of them.

    The largest divisor is `factor`; `low_freq_factor` and `high_freq_factor` are 1 and 4 in every Llama there is, so
    only the original context is unknown, and one half or twice as long gives clearly different divisors.
    """
    if (factors == 1).all():
        return {"rope_theta": theta, "rope_type": "default"}
    parameters = {"rope_theta": theta, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if np.isfinite(factors).all() and factors.max() > 1:
        parameters["factor"] = float(str(factors.max()))
        for exponent in range(2, 22):
            parameters["original_max_position_embeddings"] = 2**exponent
            if np.allclose(llama3_factors(parameters, 2 * len(factors)), factors, rtol=1e-5, atol=0):
                return parameters
    raise file.error("rope_freqs.weight are not the divisors of Llama 3.1's scaled RoPE, so they are not supported")


def rope_metadata(parameters: Mapping[str, Any], head_dim: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """({key: value}, {tensor: values}) of `rope_parameters`; settings without a key are left out."""
    metadata: dict[str, Any] = {
        "rope.freq_base": float(parameters["rope_theta"]),
        "rope.dimension_count": int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
    }
    kind = parameters.get("rope_type", "default")
    if kind == "llama3":
        return metadata, {"rope_freqs.weight": llama3_factors(parameters, head_dim)}
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        metadata["rope.scaling.original_context_length"] = parameters["original_max_position_embeddings"]
        for ours, theirs in _YARN_KEYS.items():
            if parameters.get(ours) is not None:
                metadata[f"rope.scaling.{theirs}"] = float(parameters[ours])
    return metadata, {}


def read_longrope(file: Fields, head_dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """`rope_parameters` of a Phi-3 file, which may rotate a part of each head; LongRoPE's divisors are tensors."""
    rotated = file.whole("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise file.error(f"RoPE on {rotated} dimensions of {head_dim} is not possible")
    parameters = {
        "rope_theta": file.real("rope.freq_base", 10_000.0),
        "rope_type": "default",
        "partial_rotary_factor": rotated / head_dim,
    }
    if not any(name in file.tensors for name in _LONGROPE.values()):
        file.refuse("rope.scaling.type", "rope.scaling.factor")
        return parameters
    parameters |= {ours: file.vector(name, rotated // 2).tolist() for ours, name in _LONGROPE.items()}
    original = file.whole("rope.scaling.original_context_length")
    parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    scale, factor = file.optional("rope.scaling.attn_factor"), max_position_embeddings / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    if scale is not None and not math.isclose(scale, usual, rel_tol=1e-6):  # else it follows from the rest
        parameters["attention_factor"] = scale
    return parameters


def longrope_metadata(parameters: Mapping[str, Any], scale: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys and tensors of LongRoPE, to be added to those of `rope_metadata`; `scale` multiplies cosine and sine."""
    original = parameters["original_max_position_embeddings"]
    metadata = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}
    return metadata, {name: np.asarray(parameters[ours], np.float32) for ours, name in _LONGROPE.items()}
