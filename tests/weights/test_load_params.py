"""Directories written by transformers load as the same bits; what does not fit is refused in one list."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import xla_flags
from support.family_configs import CONFIGS
from support.llama_dirs import abstract, assert_is_model, assert_same_bits, llama
from support.tiny import batch_of, documents, logits
from support.torch_models import torch_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


def spec_and_shapes(config, dtype=jnp.float32):
    spec = spec_from_config(config)
    return spec, abstract(spec, dtype)


def load(path, dtype=jnp.float32):
    reader = open_source(path)
    return load_params(reader, *spec_and_shapes(reader.config, dtype))


@pytest.fixture
def saved(tmp_path):
    """A directory whose tensors a test may change with `change(path, {...})` before loading it."""
    llama(tied=True).save_pretrained(tmp_path)
    return tmp_path


def change(path, **tensors):
    """Tensors by name with "__" for "."; None removes one."""
    file = path / "model.safetensors"
    stored = load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("count", [1, 0])
def test_layers_that_predict_further_tokens_are_left_where_the_config_has_them(saved, count):
    """As in DeepSeek V3's files, behind the decoder's own."""
    config = json.loads((saved / "config.json").read_text()) | {"num_nextn_predict_layers": count}
    (saved / "config.json").write_text(json.dumps(config))
    name = f"model__layers__{config['num_hidden_layers']}__eh_proj__weight"
    change(saved, **{name: np.ones((4, 8), np.float32)})
    if count:
        load(saved)
    else:
        with pytest.raises(UserError, match=f"unknown: {name.replace('__', '.')}"):
            load(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tmp_path, tied, dtype):
    model = llama(tied, dtype)
    model.save_pretrained(tmp_path)
    assert_is_model(load(tmp_path, str(dtype).removeprefix("torch.")), model)


def test_shards_with_an_index(tmp_path):
    model = llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_is_model(load(tmp_path), model)


def test_cast_on_the_way(saved):
    wide, narrow = tree.flatten(load(saved)), tree.flatten(load(saved, jnp.bfloat16))
    for path in wide:
        assert_same_bits(narrow[path], wide[path].astype(jnp.bfloat16))


def test_config_names_every_end_token(saved):
    assert open_source(saved).config["eos_token_id"] == 2
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert open_source(saved).config["eos_token_id"] == [2, 7]
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert open_source(saved).config["eos_token_id"] == 7


def test_harmless_leftovers_are_ignored(saved):
    before = load(saved)
    change(
        saved,
        model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32),
        lm_head__weight=load_file(saved / "model.safetensors")["model.embed_tokens.weight"],  # tied: a copy
    )
    after = load(saved)
    jax.tree.map(assert_same_bits, after, before)


@pytest.mark.parametrize("shape", [(61, 32), (60, 32)])
def test_another_head_than_the_tied_one_is_refused(saved, shape):
    change(saved, lm_head__weight=np.ones(shape, np.float32))
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding.*tie_word_embeddings"):
        load(saved)


def test_one_list_of_everything_that_does_not_fit(saved):
    change(
        saved,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__layers__0__mlp__up_proj__bias=np.ones(48, np.float32),
        model__embed_tokens__weight=np.ones((60, 32), np.float32),
        model__layers__0__mlp__down_proj__weight=np.ones((32, 48), np.int8),
    )
    with pytest.raises(UserError) as caught:
        load(saved)
    lines = [line.strip() for line in str(caught.value).splitlines()][1:-1]
    assert lines == [
        "missing: model.layers.1.mlp.up_proj.weight [48, 32]",
        "missing: model.norm.weight [32]",
        "unknown: model.layers.0.mlp.up_proj.bias",
        "shape: model.embed_tokens.weight is [60, 32], by the config [61, 32]",
        "type: model.layers.0.mlp.down_proj.weight is int8, not floating point of 16 bits or more",
    ]


def test_an_untied_model_needs_its_head(tmp_path):
    llama(tied=False).save_pretrained(tmp_path)
    change(tmp_path, lm_head__weight=None)
    with pytest.raises(UserError, match=r"missing: lm_head.weight \[61, 32\]"):
        load(tmp_path)


def test_an_absurd_number_of_layers_is_not_listed(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000}))
    reader = open_source(saved)
    with pytest.raises(UserError, match="num_hidden_layers=10000, but there are only 20 tensors"):
        load_params(reader, *spec_and_shapes(reader.config))
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_001}))
    with pytest.raises(UserError, match="num_hidden_layers=10001 is more than 10000"):
        load(saved)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(saved, value):
    weights = load_file(saved / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"].copy()
    weights[3, 5] = value
    change(saved, model__layers__1__self_attn__v_proj__weight=weights)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj\.weight: 1 of 512 values are NaN or inf"):
        load(saved)


def test_values_beyond_float16_are_named(saved):
    change(saved, model__norm__weight=np.full(32, 1e5, np.float32))
    load(saved)
    with pytest.raises(UserError, match=r"model\.norm\.weight: holds values too large for float16"):
        load(saved, jnp.float16)


def rename(path, change_name, **added):
    """Every tensor of the directory under another name, and more (a "__" stands for a ".")."""
    stored = load_file(path / "model.safetensors")
    more = {name.replace("__", "."): value for name, value in added.items()}
    save_file({change_name(name): value for name, value in stored.items()} | more, path / "model.safetensors")


def test_gpt2s_own_files_lack_the_prefix_and_hold_the_mask(tmp_path):
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    expected = load(tmp_path)
    kernel = tree.flatten(expected)["layers/self_attn/qkv_proj/kernel"]
    assert_same_bits(kernel[1], model.transformer.h[1].attn.c_attn.weight.detach().numpy())
    mask = np.tril(np.ones((1, 1, 16, 16), np.float32))
    rename(
        tmp_path,
        lambda name: name.removeprefix("transformer."),
        h__0__attn__bias=mask,
        h__1__attn__bias=mask,
        h__1__attn__masked_bias=np.array(-1e4, np.float32),
    )
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    jax.tree.map(assert_same_bits, load(tmp_path), expected)


def test_two_names_for_one_parameter_are_not_chosen_between(tmp_path):
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    rename(tmp_path, str, wpe__weight=np.ones((16, 32), np.float32), ln_f__bias=np.ones(32, np.float32))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert [line.strip() for line in str(caught.value).splitlines()][1:-1] == [
        "transformer.ln_f.bias: as ln_f.bias and as transformer.ln_f.bias",
        "transformer.wpe.weight: as transformer.wpe.weight and as wpe.weight",
    ]


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_multimodal_gemma3(tmp_path, layout):
    text = CONFIGS["gemma3"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    names = {"model.language_model.": layout}
    if layout == "language_model.model.":
        names |= {"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."}
    stored = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        stored[names.get(prefix, "") + name.removeprefix(prefix)] = tensor.detach().numpy()
    assert any("vision_tower." in name for name in stored)
    save_file(stored, tmp_path / "model.safetensors")

    leaves = tree.flatten(load(tmp_path))
    theirs = {name: t.detach().numpy() for name, t in model.model.language_model.named_parameters()}
    assert_same_bits(leaves["embed_tokens/embedding"], theirs.pop("embed_tokens.weight"))
    assert_same_bits(leaves["norm/scale"], theirs.pop("norm.weight"))
    for name, expected in theirs.items():
        layer, module = name.removeprefix("layers.").removesuffix(".weight").split(".", 1)
        path = f"layers/{module.replace('.', '/')}/{'scale' if 'norm' in module else 'kernel'}"
        assert_same_bits(leaves[path][int(layer)], np.ascontiguousarray(expected.T))
    assert len(leaves) == 2 + len(theirs) / text["num_hidden_layers"]


@pytest.mark.parametrize("name", ["mistral", "ministral3"])
def test_the_language_model_of_a_multimodal_mistral3(tmp_path, name, record_figure):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(text_config=dict(CONFIGS[name]), vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    docs = documents(0, [17])
    params = load(tmp_path)
    ours = logits(Decoder(spec_from_config(open_source(tmp_path).config)), {"params": params}, batch_of([docs], 17))[0]
    with torch.no_grad():
        theirs = model(torch.tensor(docs[0][0][None]).long()).logits[0].numpy()
    record_figure("logits", np.abs(ours - theirs).max())
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_a_multimodal_qwen(tmp_path, name):
    """Under the names of the multimodal model, beside its eyes and the head for further tokens; experts in stacks."""
    torch_model(CONFIGS[name]).save_pretrained(tmp_path / "text")
    tensors = load_file(tmp_path / "text/model.safetensors")
    for layer in range(4 if name == "qwen3_5_moe" else 0):
        prefix = f"model.layers.{layer}.mlp.experts"
        its = {
            part: [tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(5)] for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = np.concatenate([np.stack(its["gate"]), np.stack(its["up"])], axis=1)
        tensors[f"{prefix}.down_proj"] = np.stack(its["down"])
    inside = {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in tensors.items()}
    inside |= {key: np.zeros((2, 2), np.float32) for key in ("model.visual.patch_embed.proj.weight", "mtp.fc.weight")}
    (tmp_path / "whole").mkdir()
    save_file(inside, tmp_path / "whole/model.safetensors")
    config = {"model_type": name, "text_config": CONFIGS[name], "vision_config": {}, "tie_word_embeddings": False}
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    text, whole = tree.flatten(load(tmp_path / "text")), tree.flatten(load(tmp_path / "whole"))
    assert text.keys() == whole.keys()
    for path, leaf in text.items():
        assert_same_bits(leaf, whole[path])


def test_the_language_model_of_a_multimodal_gemma4(tmp_path, record_figure):
    """With a vision tower beside it, and keys in the files for layers that use those of others."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4}
    config = Gemma4Config(text_config=CONFIGS["gemma4"] | {"pad_token_id": 0}, vision_config=vision)
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".vision_tower." in name for name in stored)
    unused = np.ones((16, 32), np.float32)
    save_file(
        stored | {"model.language_model.layers.3.self_attn.k_proj.weight": unused}, tmp_path / "model.safetensors"
    )
    docs = documents(0, [17])
    params = load(tmp_path)
    ours = logits(Decoder(spec_from_config(open_source(tmp_path).config)), {"params": params}, batch_of([docs], 17))[0]
    with torch.no_grad():
        theirs = model(torch.tensor(docs[0][0][None]).long()).logits[0].numpy()
    record_figure("logits", np.abs(ours - theirs).max())
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_keys_are_not_looked_for_where_layers_use_anothers(tmp_path, name):
    torch_model(CONFIGS[name]).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    last = CONFIGS[name]["num_hidden_layers"] - 1
    assert f"model.layers.{last}.self_attn.q_proj.weight" in stored
    assert f"model.layers.{last}.self_attn.k_proj.weight" not in stored
    for layer, told in ((last, False), (0, True)):
        more = {f"model.layers.{layer}.self_attn.v_norm.weight": np.ones(8, np.float32)}
        save_file(stored | more, tmp_path / "model.safetensors")
        if told:
            with pytest.raises(UserError, match=r"unknown: model\.layers\.0\.self_attn\.v_norm\.weight"):
                load(tmp_path)
        else:
            load(tmp_path)


SHARDED = """
import sys
from pathlib import Path

import jax
import numpy as np

from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source

reader = open_source(Path(sys.argv[1]))
spec = spec_from_config(reader.config)
shapes = abstract_params(Decoder(spec), sharding.make_mesh({}, jax.devices()[:1]))
unsharded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
whole = tree.flatten(load_params(reader, spec, unsharded))
counts = {}


class Counting:
    path, config, names, shape, dtype = reader.path, reader.config, reader.names, reader.shape, reader.dtype

    def read(self, name, index=()):
        values = reader.read(name, index)
        counts[name] = counts.get(name, 0) + values.size
        return values


assert jax.device_count() == 8
for sizes in ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}, {"data": 8}):
    counts.clear()
    mesh = sharding.make_mesh(sizes)
    split = tree.flatten(load_params(Counting(), spec, abstract_params(Decoder(spec), mesh)))
    assert split.keys() == whole.keys()
    for path, array in split.items():
        assert len(array.addressable_shards) == 8
        np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[path]), path)
    is_split = [len({str(shard.index) for shard in a.addressable_shards}) > 1 for a in split.values()]
    assert any(is_split) == ("fsdp" in sizes)
    # Every value is read once, however many devices hold it.
    assert counts == {name: np.prod(reader.shape(name)) for name in reader.names()}, sizes

# Stages of layers on different devices: no rule of ours splits that axis, but a sharding may.
mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2])
places = {p: jax.P("stage") if p.startswith("layers/") else jax.P() for p in whole}
staged = {
    p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, places[p]))
    for p, x in whole.items()
}
counts.clear()
for path, array in tree.flatten(load_params(Counting(), spec, tree.unflatten(staged))).items():
    np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[path]), path)
assert counts == {name: np.prod(reader.shape(name)) for name in reader.names()}
print("equal")
"""


def test_eight_devices_read_their_slices_once(tmp_path):
    llama(tied=False).save_pretrained(tmp_path)
    env = os.environ | {"XLA_FLAGS": xla_flags(8)}
    done = subprocess.run([sys.executable, "-c", SHARDED, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
