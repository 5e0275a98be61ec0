"""From next-token logits to a token: the likeliest, or a draw after temperature, top-k, nucleus and min-p filtering.

Every setting is an array with a value for each row, so that rows with other settings share a batch and nothing compiles
anew for them.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError

BLOCK = 512  # tokens of the vocabulary that a draw looks at one by one


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The order is temperature, top-k, top-p, min-p, as in transformers' `generate`.

    temperature: 0 is greedy, and the other settings are ignored.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the nucleus, the fewest likeliest tokens whose probabilities sum to at least top_p (Holtzman et al.
      2020, arXiv:1904.09751); 1 for all.
    min_p: only tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0 for
      all.
    seed: from 0 to 2**32 - 1.

    Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        checks = {
            "temperature": (_is_number(self.temperature) and self.temperature >= 0, "0 (greedy) or a number above"),
            "top_k": (_is_int(self.top_k) and self.top_k >= 0, "a whole number, 0 for no limit"),
            "top_p": (_is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1 (all)"),
            "min_p": (_is_number(self.min_p) and 0 <= self.min_p < 1, "a number from 0 (all), below 1"),
            "seed": (_is_int(self.seed) and 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1"),
        }
        for key, (valid, wanted) in checks.items():
            if not valid:
                raise UserError(f"{key}={getattr(self, key)!r}: use {wanted}")


class Settings(NamedTuple):
    """The settings of rows, [batch] each: those of Sampling but for the seed."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32

    @classmethod
    def of(cls, samplings: list[Sampling]) -> "Settings":
        """NumPy arrays."""
        dtypes = (np.float32, np.int32, np.float32, np.float32)
        return cls(*(np.array([getattr(s, key) for s in samplings], dtype) for key, dtype in zip(cls._fields, dtypes)))


class Chosen(NamedTuple):
    """A token of each row, and how likely it was, [batch] each.

    logps: under the distribution that it was drawn from, after temperature and filters. 0 for a greedy one, which was
      certain.
    tempered_logps: after the temperature, before the filters: what a trainer can say again, which sees the logits and
      not what was kept of them. Of a greedy row as full_logps.
    full_logps: under the model's own distribution, of temperature 1 and all tokens.
    likeliest, likeliest_logps: [batch, k], the likeliest tokens there, in this order; None where nobody asks.
    """

    tokens: jax.Array  # int32
    logps: jax.Array  # float32
    tempered_logps: jax.Array  # float32
    full_logps: jax.Array  # float32
    likeliest: jax.Array | None = None  # int32
    likeliest_logps: jax.Array | None = None  # float32


def choose(logits: jax.Array, keys: jax.Array, settings: Settings, likeliest: int = 0) -> Chosen:
    """logits float32 [batch, vocab], keys PRNG [batch]. likeliest: how many of these are wanted, too."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_drawn = settings.temperature > 0

    def drawn():
        kept = filter_logits(logits, settings)
        tokens = jnp.where(is_drawn, _draw(kept, keys), greedy)
        logps = jnp.where(is_drawn, _logps(kept, tokens), 0.0)
        return tokens, logps, _logps(_tempered(logits, settings), tokens)

    def certain():
        return greedy, jnp.zeros(len(greedy), jnp.float32), _logps(logits, greedy)

    # What no row asks for costs nothing.
    tokens, logps, tempered = jax.lax.cond(is_drawn.any(), drawn, certain)
    chosen = Chosen(tokens, logps, tempered, _logps(logits, tokens))
    if not likeliest:
        return chosen
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), min(likeliest, logits.shape[-1]))
    return chosen._replace(likeliest=ids.astype(jnp.int32), likeliest_logps=values)


def _tempered(logits: jax.Array, settings: Settings) -> jax.Array:
    return logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]


def _logps(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """float32 [batch]: log softmax(logits) of the tokens, logits [batch, vocab]."""
    of_tokens = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return of_tokens - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """int32 [batch]: a token with the probability softmax(logits) of each row; -inf is never drawn.

    By the inverse of the distribution function, first of blocks of tokens and then within one, with a uniform number
    for each: a sum over the vocabulary, where the Gumbel trick draws a number for every token of it.
    """
    rows, vocabulary = logits.shape
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    blocks = jnp.pad(weights, [(0, 0), (0, -vocabulary % BLOCK)]).reshape(rows, -1, BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse(blocks.sum(axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + _inverse(inside, uniform[:, 1])).astype(jnp.int32)


def _inverse(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32 [batch]: the first index whose sum of weights [batch, n] up to it exceeds uniform [batch] of the total.

    Its weight is above 0, since the sum has grown there. The total itself is never reached by rounding: the number is
    below 1, and where the product rounds up to the total the last index with a weight is taken.
    """
    sums = jnp.cumsum(weights, axis=-1)
    index = (sums <= uniform[:, None] * sums[:, -1:]).sum(axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last).astype(jnp.int32)


def row_keys(seeds: jax.Array, rows: jax.Array) -> jax.Array:
    """PRNG keys [batch] from seeds (uint32 [batch]) and `rows` (int32 [batch], each prompt's index among all)."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def step_keys(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """PRNG keys [batch] for token number `counts` (int32 [batch]) of rows with `keys` (PRNG [batch])."""
    return jax.vmap(jax.random.fold_in)(keys, counts)


def filter_logits(logits: jax.Array, settings: Settings) -> jax.Array:
    """float32 [batch, vocab] -> the same divided by the temperature, with -inf for excluded tokens.

    Tokens as likely as the last one kept are kept too, so the result does not depend on the order of a sort. Rows of
    temperature 0 are divided by 1.
    """
    temperature, top_k, top_p, min_p = settings
    logits = _tempered(logits, settings)

    def by_rank(logits):
        limits = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
        return _keep_likeliest(logits, jnp.ones_like(logits), limits)

    def by_nucleus(logits):
        kept = _keep_likeliest(logits, jax.nn.softmax(logits, axis=-1), top_p)
        return jnp.where((top_p < 1)[:, None], kept, logits)  # a sum of all may round to 1 before its end

    def by_share(logits):
        least = logits.max(axis=-1) + jnp.log(min_p)  # -inf where it is 0
        return jnp.where(logits >= least[:, None], logits, -jnp.inf)

    steps = ((top_k > 0, by_rank), (top_p < 1, by_nucleus), (min_p > 0, by_share))
    for wanted, step in steps:
        logits = jax.lax.cond((wanted & (temperature > 0)).any(), step, lambda same: same, logits)
    return logits


def _keep_likeliest(logits: jax.Array, weights: jax.Array, limits: jax.Array) -> jax.Array:
    """Keeps tokens whose strictly likelier tokens have a total weight below the row's limit; the others become -inf.

    logits, weights: float32 [batch, vocab]; limits: float32 [batch], above 0. The smallest logit kept is found by
    bisection with 32 sums over the row, which on a CPU is ten times faster than a sort.
    """
    # The bits of floats, as integers, have the order of the floats once the negative ones are reversed; bisection over
    # integers is exact.
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    limits = limits[:, None]

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        enough = jnp.where(order > middle, weights, 0).sum(axis=-1, keepdims=True) >= limits
        return jnp.where(enough, middle + 1, low), jnp.where(enough, high, middle)

    bounds = order.min(axis=-1, keepdims=True), order.max(axis=-1, keepdims=True)
    _, last = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(order >= last, logits, -jnp.inf)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
