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
from llama_dirs import abstract, assert_is_model, assert_same_bits, llama
from safetensors.numpy import load_file, save_file

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source


def load(path, dtype=jnp.float32):
    reader = open_source(path)
    spec = spec_from_config(reader.config)
    return load_params(reader, spec, abstract(spec, dtype))


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


def test_harmless_leftovers_are_ignored(saved):
    before = load(saved)
    change(
        saved,
        model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32),
        lm_head__weight=np.ones((61, 32), np.float32),  # tied: not a parameter
    )
    after = load(saved)
    jax.tree.map(assert_same_bits, after, before)


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
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    reader = open_source(saved)
    spec = spec_from_config(reader.config)
    with pytest.raises(UserError, match="num_hidden_layers=1000000000000, but there are only 20 tensors"):
        load_params(reader, spec, abstract(spec))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(saved, value):
    weights = load_file(saved / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"].copy()
    weights[3, 5] = value
    change(saved, model__layers__1__self_attn__v_proj__weight=weights)
    with pytest.raises(
        UserError, match=r"layers\.1\.self_attn\.v_proj\.weight: 1 of 512 values are NaN or inf"
    ):
        load(saved)


def test_values_beyond_float16_are_named(saved):
    change(saved, model__norm__weight=np.full(32, 1e5, np.float32))
    load(saved)
    with pytest.raises(UserError, match=r"model\.norm\.weight: holds values too large for float16"):
        load(saved, jnp.float16)


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
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SHARDED, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"
