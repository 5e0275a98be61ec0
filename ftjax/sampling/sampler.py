"""From next-token logits to a token: greedy, or drawn after temperature, top-k and nucleus filtering."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ftjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The order is temperature, top-k, top-p, as in transformers' `generate`.

    temperature: 0 is greedy (the rest is then ignored); top_k: only the k likeliest tokens, 0 for all; top_p: only the
    nucleus, the fewest likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020), 1 for all.
    Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _require(_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(_whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 for no limit")
        _require(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0, at most 1 (all)")
        _require(_whole(self.seed) and 0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 2**32 - 1")


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """logits float32 [B, V]; keys: one PRNG key per row, [B] -> int32 [B]. `sampling.seed` is not used here."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)


def row_keys(seed: jax.Array, rows: jax.Array) -> jax.Array:
    """One PRNG key per row, [B], from (seed, the row's number among all prompts): not from where in a batch it is."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def step_keys(keys: jax.Array, count: jax.Array) -> jax.Array:
    """The rows' keys for their token number `count` (an int32 scalar)."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, count)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 [B, V] -> the same divided by the temperature (> 0), -inf where a token may not be drawn.

    Tokens as likely as the last one let in are let in too, so the outcome never hangs on a sort's order.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        last = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass of all tokens before this one
        last = jnp.min(jnp.where(likelier < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return logits


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(valid: bool, key: str, value, wanted: str) -> None:
    if not valid:
        raise UserError(f"{key}={value!r}: use {wanted}")
