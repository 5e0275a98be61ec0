"""What `forward_backward` minimizes: sums over tokens, by the names and formulas of Tinker's documentation.

Of every token there is log p(target), and what the client sends beside it. Nothing is averaged: who wants a mean sends
weights or advantages that are divided already.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Inputs = Mapping[str, jax.Array]


class TokenLoss(NamedTuple):
    """A loss and what it reads.

    Attributes:
      function: (log p(target), inputs, settings) -> losses, all float32 [B, T] but for the settings, which are scalars.
      inputs: the arrays of a datum beside `target_tokens`, and what each is where a datum has none; None: it must.
      settings: the keys of `loss_fn_config`, with their defaults; None: it must be given.
    """

    function: Callable[[jax.Array, Inputs, Inputs], jax.Array]
    inputs: Mapping[str, float | None]
    settings: Mapping[str, float | None] = {}


def _cross_entropy(logps, inputs, settings):
    return -logps * inputs["weights"]


def _importance_sampling(logps, inputs, settings):
    """REINFORCE where the tokens were drawn from another policy: tinker-docs, losses/importance-sampling."""
    return -_ratios(logps, inputs) * inputs["advantages"]


def _ppo(logps, inputs, settings):
    """Schulman et al. 2017, equation 7, with bounds of their own."""
    ratios, advantages = _ratios(logps, inputs), inputs["advantages"]
    return -jnp.minimum(ratios * advantages, _clipped(ratios, settings) * advantages)


def _cispo(logps, inputs, settings):
    """The clipped ratio is a weight without a gradient (MiniMax-M1 2025, equations 4, 5)."""
    weights = jax.lax.stop_gradient(_clipped(_ratios(logps, inputs), settings))
    return -weights * logps * inputs["advantages"]


def _dro(logps, inputs, settings):
    """A quadratic penalty holds the policy near the one that was drawn from (Richemond et al. 2024, equation 5)."""
    squares = jnp.square(logps - inputs["logprobs"])
    return -(logps * inputs["advantages"] - 0.5 * settings["beta"] * squares)


def _ratios(logps: jax.Array, inputs: Inputs) -> jax.Array:
    return jnp.exp(logps - inputs["logprobs"])


def _clipped(ratios: jax.Array, settings: Inputs) -> jax.Array:
    return jnp.clip(ratios, settings["clip_low_threshold"], settings["clip_high_threshold"])


_SAMPLED = {"logprobs": None, "advantages": None}
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES = {
    "cross_entropy": TokenLoss(_cross_entropy, {"weights": 1.0}),
    "importance_sampling": TokenLoss(_importance_sampling, _SAMPLED),
    "ppo": TokenLoss(_ppo, _SAMPLED, _CLIP),
    "cispo": TokenLoss(_cispo, _SAMPLED, _CLIP),
    "dro": TokenLoss(_dro, _SAMPLED, {"beta": None}),  # of which the documentation names no default
}
