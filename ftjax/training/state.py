"""What a training step changes: trainable parameters, optimizer state, what a method keeps, and the step number."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.models.heads import COLLECTION as HEADS
from ftjax.objectives.ppo import KL_COEF
from ftjax.objectives.reference import MOVING
from ftjax.objectives.reward import REWARDS
from ftjax.objectives.scores import SCORE
from ftjax.tree import Tree


class Kept(NamedTuple):
    """What a method keeps from step to step besides the weights, such as a controller or a moving average of them."""

    # trainable -> the first value, a dict of arrays, none of size 0
    init: Callable[[Tree], Tree]
    # (value, trainable before and after the step, metrics of the step, and sums meant for it alone:
    # `objectives.loss.Loss.kept`) -> the next value; part of the compiled step. What another keeps is not looked at.
    update: Callable[[Tree, Tree, Tree, Tree], Tree]


def together(*parts: Kept | None) -> Kept | None:
    """What all of them keep, under different names; None where that is nothing."""
    there = [part for part in parts if part is not None]

    def init(trainable: Tree) -> Tree:
        return {name: value for part in there for name, value in part.init(trainable).items()}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        return {name: new for part in there for name, new in part.update(value, before, trainable, metrics).items()}

    return Kept(init, update) if len(there) > 1 else next(iter(there), None)


def moving_reference(every: int, share: float) -> Kept:
    """A reference that follows the policy: after each `every` steps share policy + (1 - share) reference.

    TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656), equation 1. It begins as what training starts from.
    """

    def init(trainable: Tree) -> Tree:
        model = {name: part for name, part in trainable.items() if name != "heads"}
        return {MOVING: jax.tree.map(jnp.copy, model), _STEPS: jnp.zeros((), jnp.int32)}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        steps = value[_STEPS] + 1
        by = jnp.where(steps % every == 0, share, 0.0)
        model = {name: trainable[name] for name in value[MOVING]}
        moved = jax.tree.map(lambda old, new: old + by * (new - old), value[MOVING], model)
        return {MOVING: moved, _STEPS: steps}

    return Kept(init, update)


def kl_controller(first: float, target: float, horizon: float, every: int) -> Kept:
    """The coefficient of a KL divergence, which rises where that is above `target` and falls where it is below.

    Ziegler et al. 2019 (arXiv 1909.08593, section 2.2): after each `every` steps, which are of n completions with this
    divergence on the average, it is multiplied by 1 + n / horizon clip(KL / target - 1, -0.2, 0.2).
    """

    def init(trainable: Tree) -> Tree:
        return {KL_COEF: jnp.float32(first), _KL_STEPS: jnp.zeros((), jnp.int32)}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        steps, seen = value[_KL_STEPS] + 1, metrics[KL_COEF]
        error = jnp.clip(seen["kl"] / jnp.maximum(seen["completions"], 1) / target - 1, -0.2, 0.2)
        factor = jnp.where(steps % every == 0, 1 + error * seen["completions"] / horizon, 1.0)
        return {KL_COEF: value[KL_COEF] * factor, _KL_STEPS: steps}

    return Kept(init, update)


def earlier_writer(every: int) -> Kept:
    """The weights that write where each round of `every` steps is written one round ahead: those at the start of the
    last round, and in the first one those that training starts from.
    """

    def init(trainable: Tree) -> Tree:
        model = {name: part for name, part in trainable.items() if name != HEADS}
        return {WRITER: jax.tree.map(jnp.copy, model), _WRITER_STEPS: jnp.zeros((), jnp.int32)}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        starts = value[_WRITER_STEPS] % every == 0  # with this step, before which a round was written
        model = {name: before[name] for name in value[WRITER]}
        writer = jax.tree.map(lambda old, new: jnp.where(starts, new, old), value[WRITER], model)
        return {WRITER: writer, _WRITER_STEPS: value[_WRITER_STEPS] + 1}

    return Kept(init, update)


def reward_sums() -> Kept:
    """Sums over each head's rewards of the training pairs, for `normalization`; about the last 20 steps count."""

    def init(trainable: Tree) -> Tree:
        width = trainable[HEADS][SCORE]["kernel"].shape[-1]
        return {REWARDS: {"count": jnp.zeros(()), "sum": jnp.zeros(width), "squares": jnp.zeros(width)}}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        return {REWARDS: jax.tree.map(lambda old, new: 0.95 * old + new, value[REWARDS], metrics[REWARDS])}

    return Kept(init, update)


def normalization(kept: Tree) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation), float64 [K] each, of each head's rewards over the training pairs, each step counting
    0.95 of the next; 0 and 1 before the first. kept: that of a run with `reward_sums`.
    """
    count, total, squares = (np.asarray(kept[REWARDS][name], np.float64) for name in ("count", "sum", "squares"))
    mean = total / np.maximum(count, 1)
    variance = squares / np.maximum(count, 1) - mean**2
    return mean, np.sqrt(np.where(variance > 0, variance, 1.0))


_STEPS = "steps_of_reference"  # a key of `kept`
_KL_STEPS = "steps_of_kl"  # likewise
AVERAGE, AVERAGED = "average_of_trained", "averaged_steps"  # keys of `kept`
WRITER, _WRITER_STEPS = "writer", "steps_of_writer"  # likewise
_UNSEEN = (AVERAGE, AVERAGED, WRITER, _WRITER_STEPS)  # of these no objective makes anything


def with_average(kept: Kept | None, decay: float) -> Kept | None:
    """What `kept` keeps, if anything, and beside it the moving average of what is trained; 0 for none.

    It is corrected for its start, as Adam's moments are: after t steps a step i has the weight
    (1 - decay) decay^(t - i) / (1 - decay^t), and what training started from has none.
    """
    if not decay:
        return kept

    def init(trainable: Tree) -> Tree:
        return {AVERAGE: jax.tree.map(jnp.copy, trainable), AVERAGED: jnp.zeros((), jnp.float32)}

    def update(value: Tree, before: Tree, trainable: Tree, metrics: Tree) -> Tree:
        steps = value[AVERAGED] + 1
        share = (1 - decay) / -jnp.expm1(steps * math.log(decay))
        average = jax.tree.map(lambda old, new: old + share * (new - old), value[AVERAGE], trainable)
        return {AVERAGE: average, AVERAGED: steps}

    return together(kept, Kept(init, update))


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold besides the data position; not the frozen base."""

    step: jax.Array  # int32 scalar: optimizer steps done
    trainable: Tree  # the differentiated part of {"params": ..., "lora": ..., "heads": ...}
    opt_state: optax.OptState
    kept: Tree = flax.struct.field(default_factory=dict)  # `Kept`

    @property
    def collections(self) -> Tree:
        """What the objective sees of `kept`: a collection of that name, where a method keeps something."""
        others = {name: part for name, part in self.kept.items() if name not in _UNSEEN}
        return {"kept": others} if others else {}

    @property
    def result(self) -> Tree:
        """What is evaluated and exported: the average of what is trained, or where there is none that itself."""
        return self.kept.get(AVERAGE, self.trainable)

    @property
    def writer(self) -> Tree:
        """What of the trained weights writes completions: those themselves, or earlier ones (`earlier_writer`)."""
        return self.kept.get(WRITER, self.trainable)


def abstract_state(
    optimizer: optax.GradientTransformation, trainable: Tree, mesh: Mesh, kept: Kept | None = None
) -> TrainState:
    """Shapes and shardings: each optimizer moment is sharded like its parameter, everything else is replicated.

    A moment is an array of the optimizer's state at a parameter's path, with its shape. Those of another shape, such as
    Adafactor's means over rows and columns, are small. An array that a method keeps under one more name
    ({"average": {"params": ...}}) at a parameter's path, with its shape, is sharded like that parameter too.
    """
    if wrong := [f"{path} ({leaf.dtype})" for path, leaf in tree.flatten(trainable).items() if leaf.dtype != "float32"]:
        raise ValueError(f"what is trained must be float32, or small updates are lost: {', '.join(wrong)}")
    whole, params = sharding.replicated(mesh), tree.flatten(trainable)

    def like(leaf: Any, layout: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    def placed(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        # optax's states are tuples around trees of parameters: the dicts on the way are the parameter's path.
        param = params.get("/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)))
        return like(leaf, param.sharding if param is not None and param.shape == leaf.shape else whole)

    opt_state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, trainable))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        trainable=jax.tree.map(lambda leaf: like(leaf, leaf.sharding), trainable),
        opt_state=opt_state,
        kept=_abstract_kept(kept, trainable, whole) if kept else {},
    )


def _abstract_kept(kept: Kept, trainable: Tree, whole: jax.sharding.Sharding) -> Tree:
    params, abstract = tree.flatten(trainable), {}
    for path, leaf in tree.flatten(jax.eval_shape(kept.init, trainable)).items():
        param = params.get(path.partition("/")[2])
        layout = param.sharding if param is not None and param.shape == leaf.shape else whole
        abstract[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
    return tree.unflatten(abstract)


def init_state(
    optimizer: optax.GradientTransformation, trainable: Tree, abstract: TrainState, kept: Kept | None = None
) -> TrainState:
    """The state at step 0: optimizer state and kept arrays are made with the shardings of `abstract`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    first = jax.jit(kept.init, out_shardings=shardings.kept)(trainable) if kept else {}
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), trainable, opt_state, first)
