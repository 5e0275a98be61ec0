"""Runs of methods whose model writes what it learns from: a small config, and the source of a run's batches."""

import jax

from ftjax import assemble
from ftjax.rollouts import Rollouts
from support.pairs import begun, config_of

REWARD = "support.rewards:of_e"


def config_for(root, **changes):
    """Two prompts with three completions each in a step."""
    given = {
        "objective.name": "grpo",
        "objective.rewards": (REWARD,),
        "data.train": (str(root / "rows.jsonl"),),
        "data.checks": "off",
        "data.max_length": 64,
        "data.row_length": 64,
        "data.batch_size": 6,
        "rollouts.samples": 3,
        "rollouts.max_new_tokens": 8,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return config_of(root, **given | changes)


def source_of(config, workdir, end_tokens=None):
    """(the source, what training starts from, the program). end_tokens: others than the model's."""
    program, start, loader = begun(config)
    base = assemble.open_base(config.model)
    base = base if end_tokens is None else base._replace(end_tokens=end_tokens)
    with jax.set_mesh(program.mesh):
        return Rollouts(config, base, program, start.frozen, loader, workdir), start, program
