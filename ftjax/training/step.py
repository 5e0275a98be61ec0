"""The one training step: gradient accumulation, one division, one optax update, sharded over the mesh."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ftjax import tree
from ftjax.cli import UNNEEDED
from ftjax.models.routing import is_correction
from ftjax.objectives.loss import TOTALS, Loss, Objective, means, merged
from ftjax.objectives.reference import REFERENCE
from ftjax.training.state import Kept, TrainState
from ftjax.tree import Tree

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    seed: int,
    dtype: jnp.dtype | None = None,
    kept: Kept | None = None,
    totals: Callable[[Tree, Batch], Tree] | None = None,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`, compiled once; the old state's buffers are donated.

    batch: arrays [accumulate, batch / accumulate, ...]. The gradients of the micro-batches are summed in float32 by
    `lax.scan` and divided once, by the weight of the whole global batch.
    dtype: the model's compute dtype. Gradients of kernels then stay in it until they are summed: the backward pass
    computes them in it anyway, and they take half the memory.
    totals: (variables, micro-batch) -> sums that the objective must know of all micro-batches together. It finds them
    in the collection TOTALS; they have no gradient.
    metrics: float32 scalars `loss`, `grad_norm` (before clipping), `learning_rate`, and those of the objective.
    """

    updating = optax.with_extra_args_support(optimizer).update

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        collections = state.collections
        if totals is not None:
            variables = tree.combine(state.trainable, frozen) | collections
            of_each = jax.lax.map(functools.partial(totals, variables), batch)
            whole = jax.tree.map(lambda leaf: leaf.sum(axis=0), of_each)
            collections = collections | {TOTALS: jax.lax.stop_gradient(whole)}

        def micro_step(index: jax.Array | int, micro: Batch) -> tuple[Tree, Loss]:
            def loss_sum(trainable: Tree) -> tuple[jax.Array, Loss]:
                variables = tree.combine(trainable, frozen) | collections
                loss = objective(variables, micro, jax.random.fold_in(rng, index))
                return loss.sum, loss

            gradients, loss = jax.grad(loss_sum, has_aux=True)(kernels_in(state.trainable, dtype))
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients), loss

        def add(gradients: Tree, indexed: tuple[jax.Array, Batch]) -> tuple[Tree, Loss]:
            new, loss = micro_step(*indexed)
            return jax.tree.map(jnp.add, gradients, new), loss

        count = jax.tree.leaves(batch)[0].shape[0]
        loss: Loss
        if count == 1:  # saves the memory of the sum
            gradients, loss = micro_step(0, jax.tree.map(lambda leaf: leaf[0], batch))
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.trainable)
            gradients, losses = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
            loss = merged(losses)

        weight = jnp.maximum(loss.weight, 1.0)
        gradients = jax.tree.map(lambda leaf: leaf / weight, gradients)
        initial = frozen.get(REFERENCE)  # which an optimizer without L2-SP does not look at
        updates, opt_state = updating(gradients, state.opt_state, state.trainable, initial=initial)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = means(loss) | {
            "grad_norm": optax.tree.norm(tree.partition(gradients, is_correction)[1]),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        after = kept.update(state.kept, state.trainable, trainable, metrics | loss.kept) if kept else {}
        return TrainState(state.step + 1, trainable, opt_state, after), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def compiling(step: Any, mesh: Mesh, *shapes: Any) -> Callable[[], None]:
    """Begins to compile a jitted `step` for arguments of these shapes and shardings, while the caller goes on; what it
    returns waits for the end. A call with such arguments then finds it compiled; one with others compiles anew.
    """

    def compile_step() -> None:
        try:
            with jax.set_mesh(mesh):
                step.lower(*shapes).compile()
        except Exception:  # whatever it is: the call compiles once more, and fails where it is said what helps
            pass

    thread = threading.Thread(target=compile_step, name=UNNEEDED)
    thread.start()
    return thread.join


def make_eval_step(objective: Objective) -> Callable[[Tree, Tree, Batch], Loss]:
    """`eval_step(trainable, frozen, batch) -> Loss` over arrays [batch, ...]: sums, to be added and divided."""

    def eval_step(trainable: Tree, frozen: Tree, batch: Batch) -> Loss:
        return objective(tree.combine(trainable, frozen), batch, None)

    return jax.jit(eval_step)


def kernels_in(trainable: Tree, dtype: jnp.dtype | None) -> Tree:
    """`trainable` with its kernels cast; a model uses those only in products in its own dtype."""
    if dtype is None:
        return trainable
    leaves = tree.flatten(trainable)
    cast = [path for path in leaves if path.endswith("/kernel") and not path.startswith("heads/")]  # those stay float32
    return tree.unflatten(leaves | {path: leaves[path].astype(dtype) for path in cast})
