"""The optimizer and its learning-rate schedule, from config to optax."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ftjax import lora, tree
from ftjax.models.routing import is_correction
from ftjax.training.adafactor import scale_by_factored_moments
from ftjax.tree import Tree


def make_schedule(learning_rate: float, config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, or where that is 0 `warmup_ratio` of the steps; then what `name` says.

    constant stays; linear and cosine fall to `final_ratio` of the peak; wsd ("warm up, stable, decay", Hu et al. 2024)
    stays and then falls in a line over the last `decay_ratio` of the steps.
    """
    warmup = warmup_steps(config, steps)
    after = max(steps - warmup, 1)
    falling = min(decay_steps(config, steps), after)
    final = learning_rate * config.final_ratio
    constant = optax.constant_schedule(learning_rate)
    decay = {
        "constant": lambda: constant,
        "linear": lambda: optax.linear_schedule(learning_rate, final, after),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after, alpha=config.final_ratio),
        "wsd": lambda: optax.join_schedules(
            [constant, optax.linear_schedule(learning_rate, final, falling)], [after - falling]
        ),
    }[config.name]()
    # From 1/(warmup + 1), not 0, so that the first step already changes something.
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup]) if warmup else decay


def warmup_steps(config: ConfigDict, steps: int) -> int:
    return config.warmup_steps or round(config.warmup_ratio * steps)


def decay_steps(config: ConfigDict, steps: int) -> int:
    """Of wsd: one at least."""
    return max(round(config.decay_ratio * steps), 1)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """What `name` says, after clipping to a global norm; `clip_norm` 0 turns clipping off.

    The moments have the parameters' dtype, so trained parameters must be float32 (`assemble.abstract_variables`); the
    first moment may be kept in bfloat16 (`momentum_dtype`). The second never is: with b2 = 0.999 what it grows by in a
    step is less than half of bfloat16's last place, and it would stand still.

    Weight decay is decoupled (Loshchilov and Hutter 2019) for all of them, and spares vectors (norm scales, biases,
    sinks, DoRA's magnitudes): decaying those towards zero changes the function, not its complexity. With `l2_sp` there
    is a second decay, towards what training starts from, which `update` then takes as `initial`.
    `loraplus_ratio` and `groups`: see `rate_factors`.
    """
    inner = optax.chain(
        OPTIMIZERS[config.name].direction(config),
        optax.add_decayed_weights(config.weight_decay, functools.partial(_by_path, lambda path: not _is_vector(path))),
        *([_decay_to_start(config.l2_sp)] if config.l2_sp else []),
        optax.scale_by_learning_rate(schedule),
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(inner)
    if config.loraplus_ratio != 1.0 or config.groups:
        parts.append(optax.stateless(functools.partial(_scaled, config)))
    return optax.chain(*parts) if len(parts) > 1 else inner


def with_corrections(inner: optax.GradientTransformation, rate: float) -> optax.GradientTransformationExtraArgs:
    """`inner` for all but the corrections of routers, which move by `rate` against the sign of their gradient.

    That gradient is how much too many tokens an expert has (`objectives.balance.overload`), so that it is chosen less
    (Wang et al. 2024, arXiv 2408.15664, algorithm 1). No moments, no decay, no schedule.
    """
    updating = optax.with_extra_args_support(inner).update

    def init(params: Tree) -> Any:
        return inner.init(tree.partition(params, is_correction)[1])

    def update(updates: Tree, state: Any, params: Tree, **others: Any) -> tuple[Tree, Any]:
        own, rest = tree.partition(updates, is_correction)
        if others.get("initial") is not None:
            others["initial"] = tree.partition(others["initial"], is_correction)[1]
        rest, state = updating(rest, state, tree.partition(params, is_correction)[1], **others)
        return tree.combine(jax.tree.map(lambda leaf: -rate * jnp.sign(leaf), own), rest), state

    return optax.GradientTransformationExtraArgs(init, update)


def _decay_to_start(strength: float) -> optax.GradientTransformationExtraArgs:
    """L2-SP (Li et al. 2018, arXiv 1802.01483, equation 2), of everything trained but what has no start to keep to.

    Decoupled, as weight decay is: as a part of the gradient Adam would divide it by the size of the others.
    """

    def update(updates: Tree, state: optax.EmptyState, params: Tree, *, initial: Tree, **others: Any) -> tuple:
        start, now = tree.flatten(initial), tree.flatten(params)
        leaves = tree.flatten(updates)
        pulled = {path: leaves[path] + strength * (now[path] - start[path]) for path in start}
        return tree.unflatten(leaves | pulled), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def rate_factors(config: ConfigDict, paths: Sequence[str]) -> dict[str, float]:
    """{path: its learning rate over the schedule's}: the last of `groups` that matches, and for B `loraplus_ratio`.

    The latter is the learning rate of B over that of A (LoRA+, Hayou et al. 2024). UserError where a group matches
    nothing.
    """
    factors = lora.by_pattern(1.0, config.groups, paths, "optimizer.groups")
    return {path: of * (config.loraplus_ratio if path.endswith("/lora_b") else 1.0) for path, of in factors.items()}


def _scaled(config: ConfigDict, updates: Tree, params: Tree | None) -> Tree:
    leaves = tree.flatten(updates)
    factors = rate_factors(config, list(leaves))
    return tree.unflatten({path: leaf * factors[path] for path, leaf in leaves.items()})


class Optimizer(NamedTuple):
    """How one of them turns gradients into a direction, and the keys of config.optimizer that not all of them use."""

    direction: Callable[[ConfigDict], optax.GradientTransformation]
    uses: tuple[str, ...]


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=_momentum_dtype(config))


def _adafactor(config: ConfigDict) -> optax.GradientTransformation:
    return scale_by_factored_moments(lambda path: not _is_vector(path))


def _lion(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=_momentum_dtype(config))


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, each layer's on its own, and Adam for the rest.

    An update is scaled to the size of AdamW's, 0.2 sqrt(max(in, out)) (Liu et al. 2025, arXiv 2502.16982), so that
    learning rates are AdamW's.
    """
    matrices = functools.partial(_by_path, _is_hidden_matrix)
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            mu_dtype=_momentum_dtype(config),
            # Of stacks [layers, in, out] the last two axes are a matrix; each in front of them is a batch of such.
            weight_dimension_numbers=lambda params: jax.tree.map(lambda _: _LAST_TWO, params),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adams, updates)),
    )
    rest = functools.partial(_by_path, lambda path: not _is_hidden_matrix(path))
    return optax.chain(optax.masked(muon, matrices), optax.masked(_adam(config), rest))


_LAST_TWO = optax.contrib.MuonDimensionNumbers(-2, -1)


def _as_large_as_adams(update: jax.Array) -> jax.Array:
    return update * (0.2 * math.sqrt(max(update.shape[-2:])))


def _momentum_dtype(config: ConfigDict) -> str | None:
    return None if config.momentum_dtype == "float32" else config.momentum_dtype  # None: that of the parameter


OPTIMIZERS = {
    "adamw": Optimizer(_adam, uses=("b1", "b2", "eps", "momentum_dtype")),
    "adafactor": Optimizer(_adafactor, uses=()),
    "lion": Optimizer(_lion, uses=("b1", "b2", "momentum_dtype")),
    "muon": Optimizer(_muon, uses=("b1", "b2", "eps", "momentum_dtype")),
}


def _is_vector(path: str) -> bool:
    """Including the scalars of an activation (`layers.Xielu`), of the delta rule and of Mamba-2, filters of channels,
    and the correction of a router.
    """
    name = path.rpartition("/")[2]
    scalars = ("alpha_p", "alpha_n", "beta", "eps", "A_log", "D", "dt_bias", "correction")
    return name in ("scale", "bias", "sinks", "lora_magnitude", *scalars) or path.endswith(
        ("/conv1d/weight", "/conv/weight")
    )


def _is_hidden_matrix(path: str) -> bool:
    """Of a layer, not of the embedding or the output head, whose rows and columns are tokens."""
    return not _is_vector(path) and "/layers/" in path


def _by_path(chosen: Callable[[str], bool], params: Tree) -> dict[str, Any]:
    """The mask of the leaves whose path is `chosen`."""
    return tree.unflatten({path: chosen(path) for path in tree.flatten(params)})
