"""Greedy text of models with windows, ropes, sinks, experts, unlike layers, latents, states: transformers' tokens."""

import numpy as np
import pytest
import torch
from support.family_configs import CONFIGS
from support.tiny import one_device
from support.torch_models import torch_model

from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.sampling.engine import generate, stream
from ftjax.sampling.sampler import Sampling
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

NEW = 12


QUICK = (
    *("gemma3", "gpt_oss", "phi3", "gpt2", "qwen3_moe, every second layer", "deepseek_v3", "qwen3_5", "gemma4"),
    "falcon_h1",
)
MORE = (
    "ministral3",
    "cohere2",
    "phi",
    "qwen2_moe",
    "exaone4",
    "qwen3_next",
    "qwen3_5_moe",
    "lfm2",
    "granitemoehybrid",
    "nemotron_h",
    "gemma3n",
    "llama4",
)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.fixture(scope="module", params=[*QUICK, *SLOW])
def case(request, tmp_path_factory):
    """(torch's model, ours, its variables)"""
    path = tmp_path_factory.mktemp("model")
    torch_side = torch_model(CONFIGS[request.param])
    torch_side.save_pretrained(path)
    reader = open_source(path)
    model = Decoder(spec_from_config(reader.config))
    return torch_side, model, {"params": load_params(reader, model.spec, abstract_params(model, one_device()))}


def greedy(model, prompt):
    """By full forward passes, so that no cache of transformers is involved."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers(case):
    torch_side, model, variables = case
    rng = np.random.default_rng(0)
    # All longer than the 8 positions from which on the Phi-3 here uses its long frequencies.
    prompts = [rng.integers(0, 61, length).astype(np.int32) for length in (9, 23, 14)]
    expected = [greedy(torch_side, prompt) for prompt in prompts]
    completions = generate(model, variables, prompts, NEW, (), Sampling())
    assert [completion.tokens.tolist() for completion in completions] == expected
    assert list(stream(model, variables, prompts[1], NEW, (), Sampling())) == expected[1]
    assert len({tuple(tokens) for tokens in expected}) > 1
