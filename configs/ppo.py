"""PPO with a reward model: set --config.model.source, --config.data.train (prompts) and --config.objective.rewards.

It goes on from the adapter of supervised tuning, --config.adapter.source, from which it is held not to go far.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.objective.name = "ppo"
    config.objective.kl_coef = 0.05
    config.data.batch_size = 32
    config.rollouts.samples = 1
    config.rollouts.iterations = 4
    return config
