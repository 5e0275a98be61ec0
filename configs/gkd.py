"""On-policy distillation: set --config.model.source, --config.objective.teacher and --config.data.train.

The teacher is a larger model with the same vocabulary, such as another size of the same family.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "gkd"
    config.rollouts.temperature = 0.9  # TRL's
    return config
