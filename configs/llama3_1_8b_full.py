"""All weights of Llama 3.1 8B: set --config.data.train.

4,096 tokens to a row, one row a chip at a time; planned for v5e:4x4 (docs/plan.md).
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "meta-llama/Llama-3.1-8B"
    config.model.remat = "full"
    config.adapter.kind = "none"

    config.data.max_length = 4096
    config.data.batch_size = 64
    config.accumulate = 4  # 16 rows at a time: one a chip

    config.optimizer.weight_decay = 0.01
    config.epochs = 1.0
    return config
