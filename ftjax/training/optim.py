"""The optimizer and its learning-rate schedule, from config to optax."""

import functools
from collections.abc import Callable

import optax
from ml_collections import ConfigDict

from ftjax import tree
from ftjax.tree import Tree


def make_schedule(learning_rate: float, config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then constant, or falling to `final_ratio` of the peak."""
    warmup = round(config.warmup_ratio * steps)
    after = max(steps - warmup, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, learning_rate * config.final_ratio, after),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after, alpha=config.final_ratio),
    }[config.name]()
    # From 1/(warmup + 1), not 0, so that the first step already changes something.
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup]) if warmup else decay


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after clipping to a global norm; `clip_norm` 0 turns clipping off.

    The moments have the parameters' dtype, so trained parameters must be float32 (`assemble.abstract_variables`).
    Weight decay spares vectors (norm scales, biases, sinks, DoRA's magnitudes): decaying those towards zero changes the
    function, not its complexity. `loraplus_ratio` is the learning rate of B over that of A (LoRA+, Hayou et al. 2024).
    """
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=functools.partial(_by_name, lambda name: name not in _VECTORS),
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(adamw)
    if config.loraplus_ratio != 1.0:
        is_b = functools.partial(_by_name, lambda name: name == "lora_b")
        parts.append(optax.masked(optax.scale(config.loraplus_ratio), is_b))
    return optax.chain(*parts) if len(parts) > 1 else adamw


_VECTORS = ("scale", "bias", "sinks", "lora_magnitude")


def _by_name(chosen: Callable[[str], bool], params: Tree) -> Tree:
    """The mask of the leaves whose last path component is `chosen`."""
    return tree.unflatten({path: chosen(path.rpartition("/")[2]) for path in tree.flatten(params)})
