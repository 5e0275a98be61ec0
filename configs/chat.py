"""LoRA on your own conversations: set --config.model.source and --config.data.train."""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.epochs = 2.0
    return config
