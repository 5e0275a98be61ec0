"""LoRA on your own conversations: set --config.model.source and --config.data.train.

Epochs, batch, learning rate and what is computed twice are chosen for the data, the model and the devices.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    return configs.defaults()
