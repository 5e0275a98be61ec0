"""Every family from the files of transformers to ours and back: the same names, the same bits, and it loads them."""

import json

import jax
import jax.numpy as jnp
import pytest
import torch
from safetensors import safe_open
from support.family_configs import CONFIGS
from support.llama_dirs import no_tokenizer
from support.model_dirs import write_merged
from support.torch_models import torch_model
from transformers import AutoConfig, AutoModelForCausalLM

from ftjax import tree
from ftjax.models.families import FAMILIES, spec_from_config
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

NOT_COMPARED = {"transformers_version", "_name_or_path", "architectures"}


def raw(path):
    """{name: (type, shape, bytes)} of all tensors in a directory, as the safetensors library has them."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (it is no dict)
                tensor = stored.get_tensor(name).contiguous()
                found[name] = (
                    str(tensor.dtype),
                    tuple(tensor.shape),
                    tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


def loaded(path):
    reader = open_source(path)
    spec = spec_from_config(reader.config)
    dtype = jnp.dtype(reader.config["dtype"])
    abstract = tree.unflatten(
        {path: jax.ShapeDtypeStruct(key.our_shape, dtype) for path, key in hf_names(spec).items()}
    )
    return reader, spec, load_params(reader, spec, abstract)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return torch_model(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_no_bit_is_lost(model, tmp_path, dtype):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.to(getattr(torch, dtype)).save_pretrained(theirs)
    reader, spec, params = loaded(theirs)
    write_merged(ours, params, spec, reader.config, no_tokenizer)
    expected, found = raw(theirs), raw(ours)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    if dtype == "bfloat16":
        again, report = AutoModelForCausalLM.from_pretrained(ours, dtype="auto", output_loading_info=True)
        assert not any(report.values()), report
        assert again.dtype == torch.bfloat16
        assert type(again) is type(model)
        for name, tensor in model.state_dict().items():
            found = again.state_dict()[name]  # which may be float32 whatever is asked for, as routers are
            assert torch.equal(found.to(tensor.dtype), tensor), name
        before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (theirs, ours))
        assert {key: value for key, value in after.items() if key not in NOT_COMPARED} == {
            key: value for key, value in before.items() if key not in NOT_COMPARED
        }
        written = json.loads((ours / "config.json").read_text())
        assert written["architectures"] == [FAMILIES[written["model_type"]].architecture]
