"""LoRA on the attention of Qwen3-30B-A3B, a mixture of 128 experts, sized for a v5e-16: set --config.data.train."""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "Qwen/Qwen3-30B-A3B"
    config.model.remat = "full"

    config.adapter.rank = 16
    config.adapter.alpha = 32.0

    config.data.max_length = 4096
    config.data.batch_size = 16

    config.epochs = 1.0
    return config
