"""llama.cpp writes what transformers does, for architectures that transformers' own GGUF reader does not know."""

import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS
from support.llama_cpp import LlamaCpp
from support.llama_dirs import abstract
from support.torch_models import torch_model
from tokenizers import pre_tokenizers

from ftjax.models.families import spec_from_config
from ftjax.weights.gguf.tokenizer_write import to_metadata
from ftjax.weights.gguf.write import write_gguf
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

PROMPTS = 24
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
SIZES |= {"tie_word_embeddings": False}  # tied and random, a model would repeat its last token
MODELS = {
    "llama": CONFIGS["llama"],
    "granite": CONFIGS["granite"],
    "smollm3": CONFIGS["smollm3"]
    | {"no_rope_layer_interval": 4, "num_hidden_layers": 5, "use_sliding_window": False, "mlp_bias": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_tokens_are_those_of_transformers(name, tmp_path):
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # a GGUF can name it
    model = torch_model(MODELS[name] | SIZES, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.save_pretrained(tmp_path)
    reader = open_source(tmp_path)
    spec = spec_from_config(reader.config)
    words, path = to_metadata(tokenizer, reader.config), tmp_path / "model.gguf"
    write_gguf(path, load_params(reader, spec, abstract(spec)), spec, reader.config, "f16", words, name="small")
    llama_cpp, rng, compared = LlamaCpp(path), np.random.default_rng(0), []
    for length in range(4, 4 + PROMPTS):
        prompt = rng.integers(10, 300, length).tolist()
        with torch.no_grad():
            top = model(torch.tensor([prompt])).logits[0, -1].topk(2)
        if top.values[0] - top.values[1] > 0.05:  # llama.cpp computes in 16 bits
            compared.append(int(top.indices[0]))
            assert llama_cpp.greedy(prompt, 1)[0] == compared[-1:]
    assert len(compared) > PROMPTS / 2
    assert len(set(compared)) > 5
