"""The optimizer and its learning-rate schedule, from config to optax."""

import optax
from ml_collections import ConfigDict


def make_schedule(learning_rate: float, config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then constant, linear or cosine to `final_ratio` of the peak."""
    warmup = round(config.warmup_ratio * steps)
    after = max(steps - warmup, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, learning_rate * config.final_ratio, after),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, after, alpha=config.final_ratio),
    }[config.name]()
    # From 1/(warmup + 1), not 0: the first step must already do something.
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup]) if warmup else decay


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after clipping to a global norm; `clip_norm` 0 turns clipping off.

    The moments have the parameters' dtype: what is trained must be float32 (`assemble.abstract_variables` sees to it).
    Weight decay spares vectors (norm scales): decaying those towards zero changes the function, not its complexity.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _is_matrix(params):
    return {name: _is_matrix(leaf) if isinstance(leaf, dict) else name != "scale" for name, leaf in params.items()}
