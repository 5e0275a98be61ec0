"""LoRA on Gemma 3 27B, whose layers mostly see 1,024 tokens back: set --config.data.train.

One row of 4,096 tokens a chip; planned for v5e:4x4 (docs/plan.md).
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "google/gemma-3-27b-it"
    config.model.remat = "full"

    config.adapter.rank = 16
    config.adapter.alpha = 32.0

    config.data.max_length = 4096
    config.data.batch_size = 16

    config.epochs = 1.0
    return config
