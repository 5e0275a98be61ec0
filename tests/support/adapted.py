"""Models with adapters as a run assembles them from its config."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax import assemble, tree
from ftjax import config as configs
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.source import open_source
from support.tiny import one_device


class Adapted(NamedTuple):
    model: Decoder
    variables: tree.Tree
    is_trained: Callable[[str], bool]

    @property
    def trained(self) -> tree.Tree:
        return tree.partition(self.variables, self.is_trained)[0]


def assembled(directory: Path, mesh: jax.sharding.Mesh | None = None, **changes) -> Adapted:
    """What a run starts from: the base that is saved in `directory` and the adapters of a float32 config."""
    config = configs.defaults()
    config.update_from_flattened_dict({"model.dtype": "float32", "model.param_dtype": "float32"} | changes)
    reader = open_source(directory)
    base = assemble.Base(str(directory), directory, reader, Decoder(spec_from_config(reader.config)), None, ())
    abstract, is_trained = assemble.abstract_variables(config, base.model, mesh or one_device())
    return Adapted(base.model, assemble.load_variables(config, base, abstract), is_trained)


NOISE = {"lora_a": 0.1, "lora_b": 0.3, "lora_magnitude": 0.2, "kernel": 0.05, "embedding": 0.05, "scale": 0.1}


def moved(run: Adapted, seed: int = 9) -> Adapted:
    """As after training: everything trained is moved, so that an adapter adds about as much as the base has."""
    rng = np.random.default_rng(seed)
    leaves = tree.flatten(run.variables)
    for path in sorted(tree.flatten(run.trained)):
        noise = NOISE[path.rpartition("/")[2]] * rng.standard_normal(leaves[path].shape)
        leaves[path] = jax.device_put(leaves[path] + jnp.asarray(noise, jnp.float32), leaves[path].sharding)
    return run._replace(variables=tree.unflatten(leaves))
