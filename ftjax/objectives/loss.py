"""What every objective returns."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.tree import Tree


@flax.struct.dataclass
class Loss:
    """A sum and what to divide it by, never a mean: the step divides once, after all micro-batches and devices.

    So loss and gradient do not depend on how the global batch was split, but for what balance.py adds of each
    micro-batch. Each metric is a (sum, weight) pair too.

    Attributes:
      ranges: further metrics, as (smallest, largest): of "reward" they are `min_reward` and `max_reward`.
      kept: sums that only what the method keeps is told of (`training.state.Kept`), trees of arrays.
    """

    sum: jax.Array  # float32 scalar
    weight: jax.Array  # float32 scalar
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    ranges: dict[str, tuple[jax.Array, jax.Array]] = flax.struct.field(default_factory=dict)
    kept: Tree = flax.struct.field(default_factory=dict)


# The collection of what an objective must know of the whole step before its micro-batches (`method.Method.totals`).
TOTALS = "totals"

Objective = Callable[[Tree, dict[str, jax.Array], jax.Array | None], Loss]  # (variables, batch, rng; None: evaluation)


def merged(losses: Loss) -> Loss:
    """The loss of several batches together, whose own are stacked on a leading axis."""
    ranges = {name: (low.min(axis=0), high.max(axis=0)) for name, (low, high) in losses.ranges.items()}
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), losses).replace(ranges=ranges)


def means(loss: Loss) -> dict[str, jax.Array]:
    """{"loss": ..., and each metric}: the sums divided by their weights, and the ends of the ranges."""
    pairs = {"loss": (loss.sum, loss.weight)} | loss.metrics
    ends = {f"{end}_{name}": value for name, both in loss.ranges.items() for end, value in zip(("min", "max"), both)}
    return {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in pairs.items()} | ends
