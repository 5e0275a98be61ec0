"""Rewarded completions, with GRPO: set --config.model.source, --config.data.train and --config.objective.rewards.

The model must be right sometimes. Where supervised tuning made an adapter, go on from it: --config.adapter.source.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "grpo"
    return config
