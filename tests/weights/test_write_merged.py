"""What `write_merged` writes, transformers loads as the same bits; nothing half-written is left behind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_dirs import abstract, as_numpy, assert_same_bits, llama, no_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights import write
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


def loaded(directory, tied=True, dtype=torch.float32):
    """(torch's model, our parameters, spec, config)"""
    model = llama(tied, dtype)
    model.save_pretrained(directory)
    reader = open_source(directory)
    spec = spec_from_config(reader.config)
    params = load_params(reader, spec, abstract(spec, str(dtype).removeprefix("torch.")))
    return model, params, spec, reader.config


@pytest.fixture
def small(tmp_path):
    return loaded(tmp_path / "original")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_transformers_loads_the_same_bits(tmp_path, tied, dtype, limit):
    model, params, spec, config = loaded(tmp_path / "original", tied, dtype)
    out = tmp_path / "out"
    write.write_merged(out, params, spec, config, no_tokenizer, max_shard_bytes=limit)
    again, report = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert_same_bits(as_numpy(state[name]), as_numpy(expected[name]))
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.tie_word_embeddings is tied
    shards = sorted(out.glob("model*.safetensors"))
    assert (len(shards) > 1) == (limit == 20_000)
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            # A tensor larger than the limit has a shard to itself.
            assert shard.stat().st_size < limit + 2_000 or len(file.keys()) == 1


def test_numpy_parameters_and_a_cast(tmp_path, small):
    _, params, spec, config = small
    arrays = jax.tree.map(np.asarray, params)
    write.write_merged(tmp_path / "out", arrays, spec, config, no_tokenizer, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    again = load_params(open_source(tmp_path / "out"), spec, abstract(spec, jnp.bfloat16))
    for path, leaf in tree.flatten(again).items():
        assert_same_bits(leaf, tree.flatten(params)[path].astype(jnp.bfloat16))


def test_every_end_token_reaches_generation(tmp_path, small):
    _, params, spec, config = small
    config = config | {"eos_token_id": [2, 7], "auto_map": {"AutoConfig": "x.X"}, "torch_dtype": "float64"}
    write.write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [2, 7])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert not written.keys() & {"auto_map", "torch_dtype"}
    assert (tmp_path / "out/tokenizer.json").exists()


def test_an_existing_directory_is_left_alone(tmp_path, small):
    _, params, spec, config = small
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        write.write_merged(out, params, spec, config, no_tokenizer)
    assert [file.name for file in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    write.write_merged(out, params, spec, config, no_tokenizer)
    assert (out / "model.safetensors").exists()


def fails(path):
    raise RuntimeError("no tokenizer")


def test_a_failure_leaves_nothing(tmp_path, small):
    _, params, spec, config = small
    before = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no tokenizer"):
        write.write_merged(tmp_path / "out", params, spec, config, fails)
    assert set(tmp_path.iterdir()) == before


def test_a_bit_that_flips_on_the_way_to_disk_is_noticed(tmp_path, small):
    _, params, spec, config = small

    def flip(directory):
        file = directory / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    with pytest.raises(OSError, match="does not read back as it was written"):
        write.write_merged(tmp_path / "out", params, spec, config, flip)
    assert not (tmp_path / "out").exists()


def test_nan_is_not_exported(tmp_path, small):
    _, params, spec, config = small
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 32 values are NaN"):
        write.write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_model_is_refused(tmp_path, small):
    _, params, spec, config = small
    with pytest.raises(ValueError, match="the config to write describes"):
        write.write_merged(tmp_path / "out", params, spec, config | {"rms_norm_eps": 0.5}, no_tokenizer)
    assert not (tmp_path / "out").exists()
