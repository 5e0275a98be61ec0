"""The loss on held-out data."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.objectives.loss import Loss
from ftjax.step import means
from ftjax.tree import Tree


def heldout_metrics(
    eval_step: Callable[[Tree, Tree, dict[str, jax.Array]], Loss],
    trainable: Tree,
    frozen: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    on_batch: Callable[[], None],
) -> dict[str, float]:
    """{"eval_loss", "eval_mean_token_accuracy", ...}: means over the trained tokens of all batches.

    on_batch is called before each batch, and may raise to end it (`Preemption.check`).
    """
    total = None
    for batch in batches:
        on_batch()
        placed = {name: sharding.place(mesh, ("batch", "length"), array) for name, array in batch.items()}
        loss = eval_step(trainable, frozen, placed)
        total = loss if total is None else jax.tree.map(jnp.add, total, loss)
    return {f"eval_{name}": float(value) for name, value in means(total).items()}
