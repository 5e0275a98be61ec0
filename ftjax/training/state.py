"""What a training step changes: the trainable parameters, the optimizer's state and the step count."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ftjax import sharding, tree
from ftjax.tree import Tree


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold besides the data position; the frozen base is not in it."""

    step: jax.Array  # int32 scalar: optimizer steps done
    trainable: Tree  # the differentiated part of {"params": ..., "lora": ...}
    opt_state: optax.OptState


def abstract_state(optimizer: optax.GradientTransformation, trainable: Tree, mesh: Mesh) -> TrainState:
    """Shapes and shardings: each optimizer moment is laid out like its parameter, everything else is replicated."""
    if wrong := [f"{path} ({leaf.dtype})" for path, leaf in tree.flatten(trainable).items() if leaf.dtype != "float32"]:
        raise ValueError(f"what is trained must be float32, or small updates are lost: {', '.join(wrong)}")
    whole = sharding.replicated(mesh)
    opt_state = jax.eval_shape(optimizer.init, trainable)

    def like(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda moment, param: like(moment, param.sharding),
        opt_state,
        trainable,
        transform_non_params=lambda leaf: like(leaf, whole),
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        trainable=jax.tree.map(lambda leaf: like(leaf, leaf.sharding), trainable),
        opt_state=opt_state,
    )


def init_state(optimizer: optax.GradientTransformation, trainable: Tree, abstract: TrainState) -> TrainState:
    """Step 0 of `trainable`, the optimizer's state made where `abstract` puts it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), trainable, opt_state)
