"""What every objective returns."""

from collections.abc import Callable

import flax.struct
import jax

from ftjax.tree import Tree


@flax.struct.dataclass
class Loss:
    """A sum and what to divide it by, never a mean: the step divides once, after all micro-batches and devices.

    So loss and gradient do not depend on how the global batch was split. Each metric is a (sum, weight) pair too.
    """

    sum: jax.Array  # float32 scalar
    weight: jax.Array  # float32 scalar
    metrics: dict[str, tuple[jax.Array, jax.Array]]


# The collection of what an objective must know of the whole step before its micro-batches (`method.Method.totals`).
TOTALS = "totals"

Objective = Callable[[Tree, dict[str, jax.Array], jax.Array | None], Loss]  # (variables, batch, rng; None: evaluation)
