"""Answers that are called good or bad, with KTO: set --config.model.source and --config.data.train.

Where supervised tuning made an adapter (python -m ftjax.export --format peft), go on from it: --config.adapter.source.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "kto"
    return config
