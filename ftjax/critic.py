"""What reference, critic and policy say of completions that lie in rows, asked once before the steps on them."""

from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import sharding, tree
from ftjax.assemble import Program
from ftjax.data.batch import packing
from ftjax.models import heads
from ftjax.models.heads import VALUE
from ftjax.objectives.head import at_temperature, make_unembed
from ftjax.objectives.logps import token_logps
from ftjax.objectives.reference import policy_and_reference
from ftjax.training.state import TrainState
from ftjax.tree import Tree

# (state, the arrays of BATCH) -> {"reference_logps", "old_logps", "values": float32 [rows, T]}, of what is asked for
Ask = Callable[[TrainState, dict[str, np.ndarray]], dict[str, np.ndarray]]


def make_ask(config: ConfigDict, program: Program, frozen: Tree) -> Ask:
    """Asks in micro-batches like those of training, which fit the memory; to be used under the mesh.

    The reference is asked where its KL divergence is part of the reward, for log p of the targets at the temperature of
    sampling; a critic where the method has one; the policy itself for its own log p where another's is corrected for.
    """
    model, method = program.model, program.method
    unembed = at_temperature(config.rollouts.temperature, make_unembed(model))
    asks_reference = method.reference and method.kl_in_reward
    asks_policy = config.objective.correction != "none"

    def said(trainable: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        policy, reference = policy_and_reference(tree.combine(trainable, frozen))
        out = {}
        if asks_reference:
            out["reference_logps"] = token_logps(model, unembed, reference, batch, None)
        if asks_policy:
            out["old_logps"] = token_logps(model, unembed, policy, batch, None)
        if method.critic:
            hidden, _ = model.apply(policy, batch["tokens"], batch["positions"], batch["segment_ids"])
            out["values"] = heads.values(policy, VALUE, hidden)[..., 0]
        return jax.tree.map(lambda values: sharding.constrain(values, None, None), out)  # whole in every process

    compiled = jax.jit(said)

    def ask(state: TrainState, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not (asks_reference or asks_policy or method.critic):
            return {}
        parts = []
        for rows in np.split(np.arange(len(arrays["tokens"])), config.accumulate):
            placed = sharding.placed(program.mesh, {name: arrays[name][rows] for name in packing.BATCH})
            parts.append(jax.device_get(compiled(state.trainable, frozen, placed)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return ask
