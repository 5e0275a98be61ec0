"""An adapter over a GGUF file names a base that peft can load, where the file says which one that is."""

import json
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.llama_dirs import abstract
from support.tiny import CONFIG, batch_of, documents, logits, one_device
from support.torch_models import torch_model

from ftjax import assemble, tree
from ftjax import config as configs
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf import write as gguf_write
from ftjax.weights.gguf.read import hub_id
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import write_adapter
from ftjax.weights.source import open_source

TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(61)]}
COMMIT = "c" * 40
NAMED = {  # what files say of themselves -> the model that they are
    "llama.cpp's old converter": ({"general.source.huggingface.repository": "org/name"}, "org/name"),
    "a source by URL": ({"general.source.url": "https://huggingface.co/org/name-1.5B"}, "org/name-1.5B"),
    "its repository": ({"general.source.repo_url": "https://huggingface.co/org/name/"}, "org/name"),
    "a copy, whose base is the original": (
        {"general.name": "Qwen3-0.6B", "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-0.6B"},
        "Qwen/Qwen3-0.6B",
    ),
    "what it was fine-tuned from": (
        {
            "general.name": "Qwen2.5 0.5B Instruct",
            "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen2.5-0.5B",
        },
        "",
    ),
    "a page elsewhere": ({"general.source.url": "https://example.org/org/name"}, ""),
    "an owner": ({"general.source.repo_url": "https://huggingface.co/org"}, ""),
    "no string": ({"general.source.url": 3, "general.base_model.0.repo_url": ["x"]}, ""),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_model_that_a_file_says_it_is(case):
    metadata, expected = NAMED[case]
    assert hub_id(metadata) == expected


def write_gguf(path: Path, directory: Path, **metadata: str) -> assemble.Base:
    """A Base without a tokenizer: the model in `directory` as a GGUF file with further metadata."""
    reader = open_source(directory)
    spec = spec_from_config(reader.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_write, "_general", lambda *_: metadata)
        params = load_params(reader, spec, abstract(spec))
        gguf_write.write_gguf(path, params, spec, reader.config, "f16", TOKENIZER, lambda path: None, "small")
    return assemble.Base(str(path), path, open_source(path), Decoder(spec), None, ())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_peft_loads_it_over_the_model_that_the_file_names(tmp_path, monkeypatch):
    """From a cache as huggingface_hub keeps it, with weights that F16 holds exactly, so that the logits are ours."""
    model = torch_model(CONFIG).half().float()
    snapshot = tmp_path / "hub/models--org--small/snapshots" / COMMIT
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(COMMIT)
    base = write_gguf(tmp_path / "small.gguf", snapshot, **{"general.source.huggingface.repository": "org/small"})

    config = configs.defaults()
    config.adapter.update(rank=2, targets="q_proj,up_proj")
    shapes, _ = assemble.abstract_variables(config, base.model, one_device())
    leaves, rng = tree.flatten(assemble.load_variables(config, base, shapes)), np.random.default_rng(0)
    for path in [path for path in leaves if path.endswith("lora_b")]:
        leaves[path] = rng.standard_normal(leaves[path].shape).astype(np.float32) * 0.2
    variables = jax.device_get(tree.unflatten(leaves))
    facts = assemble.base_facts(config, base)
    write_adapter(tmp_path / "adapter", variables["lora"], base.model.spec, facts)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/small"

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "hub")
    tokens = documents(0, [12])[0][0]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], len(tokens))
    found = logits(base.model, variables, batch)[0]
    assert np.abs(found - expected).max() < 1e-5
    plain = logits(base.model, {"params": variables["params"]}, batch)[0]
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("package", [False, True])
def test_a_file_that_names_no_model_is_named_by_its_path(tmp_path, package):
    torch_model(CONFIG).save_pretrained(tmp_path / "model")
    base = write_gguf(tmp_path / "small.gguf", tmp_path / "model")
    base = base._replace(source="package:small") if package else base
    assert assemble.base_facts(configs.defaults(), base).name == str(tmp_path / "small.gguf")


def test_a_base_from_the_hub_is_named_with_its_commit(tmp_path):
    torch_model(CONFIG).save_pretrained(tmp_path / "model")
    reader = open_source(tmp_path / "model")
    base = assemble.Base("org/small", tmp_path, reader, Decoder(spec_from_config(reader.config)), None, ())
    config = configs.defaults()
    config.model.revision = COMMIT
    config.adapter.update(rank=2, targets="q_proj")
    shapes, _ = assemble.abstract_variables(config, base.model, one_device())
    lora = assemble.load_variables(config, base, shapes)["lora"]
    write_adapter(tmp_path / "adapter", lora, base.model.spec, assemble.base_facts(config, base))
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("org/small", COMMIT)
