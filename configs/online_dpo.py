"""Preferences of a reward or a judge between completions that the model writes: set --config.model.source,
--config.data.train and --config.objective.rewards or --config.objective.judge.

Where supervised tuning made an adapter, go on from it: --config.adapter.source.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "online_dpo"
    config.rollouts.samples = 2  # TRL's, and the following
    config.rollouts.max_new_tokens = 64
    config.rollouts.temperature = 0.9
    return config
