"""What `write_merged` writes, transformers loads as the same bits; nothing half-written is left behind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.chat_templates import CHATML, make_tokenizer
from support.family_configs import CONFIGS
from support.llama_dirs import abstract, as_numpy, assert_same_bits, llama, no_tokenizer
from support.model_dirs import with_scale, write_merged
from support.tiny import numpy_params
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ftjax import lora, tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.hf import safetensors_write, write
from ftjax.weights.hf.together import gather
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


def test_a_routers_correction_stays_in_float32_whatever_the_rest_is(tmp_path):
    spec = spec_from_config(CONFIGS["deepseek_v3"])
    params = numpy_params(Decoder(spec))
    write_merged(tmp_path / "out", params, spec, CONFIGS["deepseek_v3"], no_tokenizer, dtype=jnp.bfloat16)
    with safe_open(tmp_path / "out/model.safetensors", "np") as stored:
        found = stored.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert stored.get_slice("model.layers.1.mlp.gate.weight").get_dtype() == "BF16"
    assert_same_bits(found, params["layers"]["sparse_1"]["mlp"]["correction"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
def test_transformers_loads_the_same_bits(tmp_path, tied, dtype, limit):
    model, params, spec, config = loaded(tmp_path / "original", tied, dtype)
    out = tmp_path / "out"
    write_merged(out, params, spec, config, no_tokenizer, max_shard_bytes=limit)
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
    write_merged(tmp_path / "out", arrays, spec, config, no_tokenizer, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    again = load_params(open_source(tmp_path / "out"), spec, abstract(spec, jnp.bfloat16))
    for path, leaf in tree.flatten(again).items():
        assert_same_bits(leaf, tree.flatten(params)[path].astype(jnp.bfloat16))


def test_every_end_token_reaches_generation(tmp_path, small):
    _, params, spec, config = small
    config = config | {"eos_token_id": [2, 7], "auto_map": {"AutoConfig": "x.X"}, "torch_dtype": "float64"}
    write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
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
        write_merged(out, params, spec, config, no_tokenizer)
    assert [file.name for file in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    write_merged(out, params, spec, config, no_tokenizer)
    assert (out / "model.safetensors").exists()


def fails(path):
    raise RuntimeError("no tokenizer")


def test_a_failure_leaves_nothing(tmp_path, small):
    _, params, spec, config = small
    before = set(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no tokenizer"):
        write_merged(tmp_path / "out", params, spec, config, fails)
    assert set(tmp_path.iterdir()) == before


def test_a_bit_that_flips_on_the_way_to_disk_is_noticed(tmp_path, small, monkeypatch):
    _, params, spec, config = small
    read_back = safetensors_write._verify

    def flip(path, *arguments):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        read_back(path, *arguments)

    monkeypatch.setattr(safetensors_write, "_verify", flip)
    with pytest.raises(OSError, match="does not read back as it was written"):
        write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    assert not (tmp_path / "out").exists()


def random_adapters(params, spec):
    rng = np.random.default_rng(0)
    leaves, out = tree.flatten(params), {}
    for path in lora.find_targets("q_proj,down_proj", lora.linear_kernels(leaves)):
        *stack, rows, columns = leaves[path].shape
        module = path.removesuffix("/kernel")
        out[f"{module}/lora_a"] = rng.standard_normal((*stack, rows, 3)).astype(np.float32)
        out[f"{module}/lora_b"] = rng.standard_normal((*stack, 3, columns)).astype(np.float32)
    return with_scale(tree.unflatten(out), 0.25)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_adapter_is_merged_in_float32_and_rounded_once(tmp_path, dtype):
    _, params, spec, config = loaded(tmp_path / "original", dtype=torch.bfloat16)
    adapters = random_adapters(params, spec)
    directory = tmp_path / "out"
    directory.mkdir()
    write.write_model(directory, params, spec, config, adapters=adapters, dtype=dtype)
    found = tree.flatten(load_params(open_source(directory), spec, abstract(spec, dtype)))
    lora_leaves = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(adapters).items()}
    for path, leaf in tree.flatten(params).items():
        exact, module = np.asarray(leaf, np.float64), path.removesuffix("/kernel")
        if f"{module}/lora_a" in lora_leaves:
            a, b, scale = (lora_leaves[f"{module}/{half}"] for half in ("lora_a", "lora_b", "lora_scale"))
            exact = exact + a @ b * scale[:, None, None]
            rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-20
            np.testing.assert_allclose(np.asarray(found[path], np.float64), exact, rtol=rounding, atol=1e-5)
        else:
            assert_same_bits(found[path], np.asarray(leaf).astype(dtype))


def test_only_one_tensor_at_a_time_comes_from_the_devices(tmp_path, small, monkeypatch):
    _, params, spec, config = small
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    shapes = []

    def watched(leaf, place):
        shapes.append(gather(leaf, place).shape)
        return gather(leaf, place)

    monkeypatch.setattr(write, "gather", watched)
    write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    assert len(shapes) == 2 * 9 + 2  # two layers of nine tensors, the embedding and the last norm
    assert max(len(shape) for shape in shapes) == 2


def test_the_data_are_aligned_and_without_gaps(tmp_path, small):
    _, params, spec, config = small
    write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(end for _, end in ends)] == [*(start for start, _ in ends), len(raw) - 8 - length]


def test_nan_is_not_exported(tmp_path, small):
    _, params, spec, config = small
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 32 values are NaN"):
        write_merged(tmp_path / "out", params, spec, config, no_tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (None, {"bos_token_id": 1, "eos_token_id": [2, 7]}),
        # As published with Llama 2: sampling settings that do_sample does not switch on.
        ({"temperature": 0.6, "top_p": 0.9, "pad_token_id": 0}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.7, "max_length": 4096}, {"temperature": 0.7, "max_length": 4096}),
        ({"temperature": 1.0, "top_k": 50, "do_sample": False}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"do_sample": False, "top_p": None}),
        ({"bos_token_id": 5, "eos_token_id": 7, "pad_token_id": 9}, {"bos_token_id": 5, "pad_token_id": 9}),
    ],
)
def test_generation_settings_are_the_bases_and_transformers_takes_them(tmp_path, small, base, expected):
    _, params, spec, config = small
    config = config | {"eos_token_id": [2, 7]}
    write.write_model(tmp_path, params, spec, config, generation=base)
    written = GenerationConfig.from_pretrained(tmp_path)
    written.validate(strict=True)
    for key, value in (expected | {"eos_token_id": [2, 7]}).items():
        assert getattr(written, key) == value, key


def test_the_bases_own_tokenizer_files_come_along(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    (base / "model.py").write_text("not a tokenizer")
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    content = json.loads((base / "tokenizer_config.json").read_text())
    code = {"auto_map": {"AutoTokenizer": ["model.X", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(content | code))
    write.write_tokenizer(out, tokenizer, base)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer.model"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == content
    assert (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == CHATML
    assert again.encode("the lamp<|im_end|>") == tokenizer.encode("the lamp<|im_end|>")


def test_another_end_token_than_the_bases_files_have_is_written_into_them(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    tokenizer = make_tokenizer(CHATML, eos="</s>")
    tokenizer.save_pretrained(base)
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>", "lstrip": false}}')
    tokenizer.eos_token = "<|im_end|>"
    write.write_tokenizer(out, tokenizer, base)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    before, after = (json.loads((where / "tokenizer_config.json").read_text()) for where in (base, out))
    assert after == before | {"eos_token": "<|im_end|>"}
    assert json.loads((out / "special_tokens_map.json").read_text()) == {"eos_token": "<|im_end|>"}


def test_a_config_of_another_model_is_refused(tmp_path, small):
    _, params, spec, config = small
    with pytest.raises(ValueError, match="the config to write describes"):
        write_merged(tmp_path / "out", params, spec, config | {"rms_norm_eps": 0.5}, no_tokenizer)
    assert not (tmp_path / "out").exists()
