"""Supervised tuning on the best of the model's own completions: set --config.model.source, --config.data.train and
--config.objective.rewards.

Where supervised tuning made an adapter, go on from it: --config.adapter.source.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "rejection"
    return config
