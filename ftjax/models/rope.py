"""Rotary frequencies from the `rope_parameters` (or older keys) of a Hugging Face config, and the angles they give."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec, Rope

TYPES = ("default", "linear", "llama3", "longrope", "proportional", "yarn")


def rope_parameters(config: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """One dict with `rope_type`, `rope_theta`, `partial_rotary_factor` and what the type needs, of old and new configs.

    Transformers 5 writes `rope_parameters`; before it were `rope_theta`, `rope_scaling` and `partial_rotary_factor`
    at the top, with `type` for `rope_type` and, in the first files with LongRoPE's factors, "su" or "yarn" for it.
    """
    # Who adds `rope_scaling` to a newer file, as Qwen's model cards say, means it.
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"config.json: the RoPE parameters are {str(given)[:80]!r}, not an object")
    found = dict(given)
    kind = found.pop("type", "default")
    kind = found.get("rope_type") or kind
    if kind == "su" or (kind == "yarn" and "short_factor" in found):
        kind = "longrope"
    found["rope_type"] = kind
    for name, default in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0)):
        if found.get(name) is None:
            found[name] = default if config.get(name) is None else config[name]
    if kind in ("llama3", "longrope", "yarn"):
        original = config.get("original_max_position_embeddings")  # where Phi-3 has it, and there it has the last word
        original = original or found.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["original_max_position_embeddings"] = original
    return found


def make_rope(parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """The Rope that `rope_parameters` describe. UserError for a type that is not in TYPES and for missing numbers."""
    kind = parameters["rope_type"]
    if kind not in TYPES:
        raise UserError(f"config.json: rope_type {str(kind)[:80]!r} is not supported; there are: {', '.join(TYPES)}")
    try:
        return _make_rope(kind, parameters, head_dim, max_position_embeddings)
    except KeyError as error:
        raise UserError(f"config.json: rope_type {kind!r} needs {error} beside it") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"config.json: the rope parameters {str(parameters)[:200]} are not usable ({error})") from error


def _make_rope(kind: str, parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    share = parameters["partial_rotary_factor"]
    if not 0 < share <= 1:
        raise ValueError("partial_rotary_factor is a share of a head")
    dim = int(head_dim * share)
    for name in ("rope_theta", "factor"):
        value = parameters.get(name, 1.0)
        if value is not None and (isinstance(value, str | list | bool) or not 0 < value < math.inf):
            raise ValueError(f"{name} is not a positive number")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        # In float32, as Hugging Face computes them: that is what the models were trained with.
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = np.float32(1) / np.float32(parameters["rope_theta"]) ** exponents
        if kind == "default":
            return Rope(_tuple(frequencies))
        if kind == "proportional":
            return Rope(_tuple(_proportional(parameters, head_dim)))
        if kind == "linear":  # position interpolation (Chen et al. 2023)
            return Rope(_tuple(frequencies / np.float32(parameters["factor"])))
        if kind == "llama3":
            return Rope(_tuple(_llama3(frequencies, parameters)))
        if kind == "yarn":
            return Rope(_tuple(_yarn(frequencies, parameters)), _yarn_scale(parameters))
        return _longrope(frequencies, parameters, max_position_embeddings)


def rotary_tables(ropes: tuple[Rope, ...], positions: jax.Array, reach: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines), float32 [ropes, B, T, pairs]; positions int32 [B, T], or [B, T, 3] of ropes with sections.

    pairs are those of the rope that has most; what is beyond another's turns nothing.

    reach: int32, broadcast against positions: the length of the sequence that a token is part of, for LongRoPE.
    """
    angles, scales, pairs = [], [], max(len(rope.frequencies) for rope in ropes)
    for rope in ropes:
        frequencies = jnp.asarray(rope.frequencies, jnp.float32)
        if rope.long_frequencies is not None:
            is_long = jnp.broadcast_to(reach > rope.long_after, positions.shape)
            frequencies = jnp.where(is_long[..., None], jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
        if positions.ndim == 3:
            own = positions[..., np.repeat(np.arange(len(rope.sections)), rope.sections)]
        else:
            own = positions[..., None]
        turned = own.astype(jnp.float32) * frequencies
        angles.append(jnp.pad(turned, [(0, 0), (0, 0), (0, pairs - turned.shape[-1])]))
        scales.append(rope.scale)
    angles, scales = jnp.stack(angles), jnp.asarray(scales, jnp.float32)[:, None, None, None]
    return jnp.cos(angles) * scales, jnp.sin(angles) * scales


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Turns the first 2 * pairs dimensions of each head, its first half paired with its second as Hugging Face does.

    x [B, T, heads, head_dim]; cos, sin float32 [B, T, pairs]; interleaved: pairs are neighbors instead, as in the
    paper. Computed in float32, returned in x's dtype.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = x[..., : 2 * pairs].astype(jnp.float32)
    halves = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    first, second = halves
    parts = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
    if interleaved:
        parts = [jnp.stack(parts, axis=-1).reshape(turned.shape)]
    return jnp.concatenate([*parts, x[..., 2 * pairs :]], axis=-1)


def sequence_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """int32 [B, T]: one more than the greatest position in each token's segment."""
    slots = positions.shape[1] + 1
    longest = jax.vmap(lambda position, segment: jax.ops.segment_max(position + 1, segment, slots)[segment])
    return longest(positions, segment_ids)


def _tuple(frequencies: np.ndarray) -> tuple[float, ...]:
    if not np.isfinite(frequencies).all():
        raise ValueError("they give frequencies that are not finite")
    return tuple(float(value) for value in frequencies.astype(np.float32))


def _llama3(frequencies: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, those between interpolated."""
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / np.float32(2 * math.pi)
    smooth = ((turns - np.float32(low)) / np.float32(high - low)).astype(np.float32)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return np.where(turns < low, frequencies / factor, np.where(turns > high, frequencies, between))


def _proportional(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """Gemma 4: the frequencies of a whole head, of which the slowest are 0, so that what they would turn stays."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(parameters["rope_theta"]) ** exponents / parameters.get("factor", 1.0)
    return np.where(np.arange(head_dim // 2) < int(parameters["partial_rotary_factor"] * head_dim // 2), frequencies, 0)


def _yarn(frequencies: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """YaRN (Peng et al. 2023, section 3.2): a ramp over the pairs from extrapolation to interpolation."""
    pairs, theta = len(frequencies), parameters["rope_theta"]
    original = parameters["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (np.arange(pairs, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    return frequencies / np.float32(parameters["factor"]) * (1 - kept) + frequencies * kept


def _yarn_scale(parameters: dict[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor, over, under = (parameters.get(name) for name in ("factor", "mscale", "mscale_all_dim"))
    both = over and under
    return yarn_magnitude(factor, over) / yarn_magnitude(factor, under) if both else yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, weight: float) -> float:
    """By how much YaRN makes scores, or their square roots, larger (Peng et al. 2023, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(frequencies: np.ndarray, parameters: dict[str, Any], max_position_embeddings: int) -> Rope:
    """LongRoPE (Ding et al. 2024): a divisor per pair, one set for short and one for long sequences."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position_embeddings / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (np.asarray(parameters[name], np.float32) for name in ("short_factor", "long_factor"))
    if short.shape != frequencies.shape or long.shape != frequencies.shape:
        raise ValueError(f"short_factor and long_factor need {len(frequencies)} numbers each")
    return Rope(_tuple(frequencies / short), float(scale), _tuple(frequencies / long), original)


def tables(
    spec: DecoderSpec, positions: jax.Array, reach: Callable[[], jax.Array]
) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines of every rope, and 1 and 0 after them where some layers have none. None if all have none.

    positions and reach() as `rotary_tables` has them. Returns float32 [ropes, B, T, pairs] each.
    """
    if not spec.ropes:
        return None
    needs_reach = any(rope.long_frequencies is not None for rope in spec.ropes)
    cos, sin = rotary_tables(spec.ropes, positions, reach() if needs_reach else None)
    if None in spec.layer_ropes:
        cos = jnp.concatenate([cos, jnp.ones_like(cos[:1])])
        sin = jnp.concatenate([sin, jnp.zeros_like(sin[:1])])
    return cos, sin


def table_of_layers(spec: DecoderSpec) -> list[int]:
    """Which of the `tables` each layer uses; the one after the ropes' turns nothing."""
    return [len(spec.ropes) if rope is None else rope for rope in spec.layer_ropes]
