"""LoRA on the attention of Qwen3-30B-A3B, a mixture of 128 experts: set --config.data.train.

One row of 4,096 tokens a chip; planned for v5e:4x4 (docs/plan.md).
"""

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
