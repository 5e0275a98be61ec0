"""How evenly the routers of a mixture load its experts, as metrics, and what evens the load out."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.groups import stacks
from ftjax.models.routing import NOTES, is_correction
from ftjax.models.spec import DecoderSpec
from ftjax.models.vision import images_of
from ftjax.tree import Tree


def hidden_and_notes(
    model: Decoder, variables: Tree, batch: dict[str, jax.Array], rng: jax.Array | None, noted: bool
) -> tuple[jax.Array, Tree | None]:
    """The hidden states [B, T, D] of a batch, and what `routing.note` noted of it where it is `noted`, of a mixture."""
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    further = {"images": images_of(batch), "rngs": None if rng is None else {"dropout": rng}}
    if not noted or not is_mixture(model.spec):
        return model.apply(variables, *given, **further)[0], None
    (hidden, _), changed = model.apply(variables, *given, **further, mutable=[NOTES])
    return hidden, changed[NOTES]


def is_mixture(spec: DecoderSpec) -> bool:
    return any(stack.spec.experts for stack in stacks(spec))


def measures(notes: Tree) -> dict[str, jax.Array]:
    """float32 scalars, each the mean over the layers with experts.

    balance: E sum_e f_e p_e, f_e being the share of tokens that expert e is given and p_e its mean score, 1 for each of
    a token's experts where both are even (Fedus et al. 2022, arXiv 2101.03961, equations 4 to 6; transformers has the
    f and p of all layers together); z: the mean of log(Z)^2 (Zoph et al. 2022, arXiv 2202.08906, equation 5); load:
    the tokens of the expert with the most, over the mean; idle: the share of experts without any.
    """
    found: dict[str, list[jax.Array]] = {"balance": [], "z": [], "load": [], "idle": []}
    for its in tree.by_module(notes).values():
        given, tokens = its["given"], jnp.maximum(its["tokens"], 1.0)  # [layers, E], [layers]
        shares, scores = given / tokens[..., None], its["liked"] / tokens[..., None]
        found["balance"].append(given.shape[-1] * (shares * scores).sum(axis=-1))
        found["z"].append(its["z"] / tokens)
        found["load"].append(given.max(axis=-1) / jnp.maximum(given.mean(axis=-1), 1e-9))
        found["idle"].append((given == 0).mean(axis=-1))
    return {name: jnp.concatenate([each.reshape(-1) for each in values]).mean() for name, values in found.items()}


def overload(notes: Tree, params: Tree) -> jax.Array:
    """0, whose gradient for a router's corrections is by how many tokens each expert has more than the mean.

    So the sign of what a step sums up is that of Wang et al. 2024 (arXiv 2408.15664, section 3), over all of the step's
    tokens; `training.optim.with_corrections` takes it.
    """
    total, routers = jnp.zeros(()), tree.by_module(notes)
    for path, correction in tree.flatten(params).items():
        if is_correction(path):
            given = routers[path.rpartition("/")[0]]["given"]
            more = jax.lax.stop_gradient(given - given.mean(axis=-1, keepdims=True)).reshape(correction.shape)
            total += (more * (correction - jax.lax.stop_gradient(correction))).sum()
    return total


def check(config: ConfigDict, spec: DecoderSpec, trained: Iterable[str]) -> None:
    """UserError where a setting of config.objective has no router to act on; trained: paths that training changes."""
    keys = ("router_balance", "router_z_loss", "router_bias_rate")
    chosen = [key for key in keys if config[key]]
    if chosen and not is_mixture(spec):
        raise UserError(
            f"config.objective.{chosen[0]}={config[chosen[0]]:g}: this model ({spec.family}) is no mixture of experts; "
            "leave it out"
        )
    if config.router_bias_rate and not any(map(is_correction, trained)):
        corrected = any(stack.spec.experts and stack.spec.experts.correction for stack in stacks(spec))
        why = (
            "the corrections are not trained; set config.adapter.kind='none', and adapter.trainable so that it matches "
            "them"
            if corrected
            else f"the routers of a {spec.family} model have no corrections; use config.objective.router_balance"
        )
        raise UserError(f"config.objective.router_bias_rate={config.router_bias_rate:g}: {why}")
