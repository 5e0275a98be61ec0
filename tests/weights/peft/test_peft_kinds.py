"""Every kind of adapter goes to the real `peft` and comes from it, to go on from, with the same logits."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from support.family_configs import CONFIGS
from support.more_configs import MORE_CONFIGS
from support.tiny import batch_of, documents, logits, one_device
from support.torch_models import torch_model

from ftjax import assemble, tree
from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.weights.peft import continued
from ftjax.weights.peft.adapter import base_digest, directory_digest, open_adapter, write_adapter
from ftjax.weights.peft.vllm import uniform
from ftjax.weights.source import open_source

pytestmark = [
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It sets fan_in_fan_out right for each layer, and says so where the config's is another.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # Here the adapter of a tied embedding is one of the embedding alone, which peft warns of and keeps to.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # Of patterns of parameters peft says that they are ignored, and follows them.
    pytest.mark.filterwarnings(r"ignore:The following rank_pattern keys .* ignored. .'mlp.*weight':RuntimeWarning"),
]

TOKENS = documents(0, [12])[0][0]
UNTIED = "llama, untied, head_dim"
MODELS = CONFIGS | MORE_CONFIGS


@functools.cache
def base_of(name, root):
    """(a Base without a tokenizer, its directory) of the torch model `name`."""
    path = root / name.replace(", ", "_")
    torch_model(MODELS[name]).save_pretrained(path)
    reader = open_source(path)
    return assemble.Base(name, path, reader, Decoder(spec_from_config(reader.config)), None, ())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def torch_base(name, root):
    """The model `name` anew: peft changes the one that it is given."""
    model = torch_model(MODELS[name])
    return type(model).from_pretrained(base_of(name, root).path, attn_implementation="eager").eval()


def config_of(**changes):
    config = configs.defaults()
    config.adapter.update(changes)
    return config


def variables_of(base, config):
    """(variables, the paths that training changes)"""
    abstract, is_trained = assemble.abstract_variables(config, base.model, one_device())
    trained, _ = tree.partition(abstract, is_trained)
    return assemble.load_variables(config, base, abstract), list(tree.flatten(trained))


def trained_a_little(variables, paths):
    """As after training: everything that is trained is somewhere else, and layers without an adapter have none."""
    rng, leaves = np.random.default_rng(0), tree.flatten(variables)
    for path in paths:
        size = 0.2 if path.endswith("lora_b") else 0.1
        moved = np.asarray(leaves[path]) + (rng.standard_normal(leaves[path].shape) * size).astype(np.float32)
        leaves[path] = np.where(adapted(leaves, path), moved, leaves[path])
    return tree.unflatten(leaves)


def adapted(leaves, path):
    """Where a part of an adapter belongs to a layer that has one: a mask as wide as it; elsewhere True."""
    there = np.asarray(leaves.get(f"{path.rpartition('/')[0]}/lora_scale", np.ones(()))) != 0
    return there.reshape(there.shape + (1,) * (np.ndim(leaves[path]) - there.ndim))


@functools.cache
def plain_logits(name, root):
    return torch_logits(torch_base(name, root))


def our_logits(base, variables):
    batch = batch_of([[(TOKENS, np.ones(len(TOKENS), bool))]], len(TOKENS))
    # From the host, so that arrays on a device and NumPy's do not need a compilation each.
    return logits(base.model, jax.device_get(variables), batch)[0]


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None], dtype=torch.long)).logits[0].numpy()


def written(out, base, config, variables):
    saved = {path: tree.flatten(variables["params"])[path] for path in assemble.trained_whole(config, base)}
    rslora = continued.effective(config, base.model.spec).adapter.rslora
    write_adapter(out, variables["lora"], base.model.spec, assemble.base_facts(config, base), rslora, saved)
    return json.loads((out / "adapter_config.json").read_text())


OURS = {
    "dora of conv1d and head": (
        "gpt2, plain, relu",
        {"kind": "dora", "rank": 2, "targets": "up_proj,lm_head", "rslora": True},
        {"use_dora": True, "fan_in_fan_out": True},
    ),
    "patterns": (
        "llama",
        {"rank": 3, "alpha": 6.0, "rank_pattern": (("mlp", 2), ("up_proj", 4)), "alpha_pattern": (("q_proj", 1.5),)},
        {
            "r": 3,
            "lora_alpha": 6,
            "rank_pattern": {"gate_proj": 2, "down_proj": 2, "up_proj": 4},
            "alpha_pattern": {"q_proj": 1.5},
        },
    ),
    "some layers": (
        "llama",
        {"rank": 3, "targets": "q_proj,down_proj", "layers": "0,2", "rank_pattern": (("down_proj", 2),)},
        {"r": 3, "layers_to_transform": [0, 2], "target_modules": ["down_proj", "q_proj"]},
    ),
    "DoRA of one layer": (
        "gpt2",
        {"kind": "dora", "rank": 2, "layers": "1", "dropout": 0.1},
        {"layers_to_transform": [1], "lora_dropout": 0.1},
    ),
    "PiSSA of one layer": (
        "llama",
        {"init": "pissa", "rank": 2, "layers": "1", "targets": "up_proj"},
        {"layers_to_transform": [1], "r": 4},
    ),
    "the first of unlike layers": (
        "qwen3_moe, a dense layer first",
        {"rank": 3, "layers": "0-1", "targets": "(q_proj|mlp/up_proj)/kernel"},
        {
            "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
            "target_parameters": ["mlp.up_proj.weight"],
        },
    ),
    "patterns where a name is two layers'": (
        "gpt2",
        {"rank": 3, "rslora": True, "rank_pattern": (("self_attn/o_proj", 5),)},
        {"r": 3, "rank_pattern": {r"attn\.c_proj": 5}},
    ),
    "patterns of unlike layers": (
        "qwen3_moe, a dense layer first",
        {"rank": 3, "alpha": 6.0, "rank_pattern": (("dense_0", 2),), "alpha_pattern": (("o_proj", 1.5),)},
        {
            "r": 3,
            "rank_pattern": {
                **{rf"model\.layers\.0\.self_attn\.{name}_proj": 2 for name in "qkvo"},
                **{rf"mlp\.{name}_proj\.weight": 2 for name in ("gate", "up", "down")},
            },
            "alpha_pattern": {"o_proj": 1.5},
            "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
            "target_parameters": [f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")],
        },
    ),
    "some of unlike layers": (
        "qwen3_moe, every second layer",
        {"rank": 3, "targets": "sparse_1/self_attn/[qv]_proj", "modules_to_save": ("input_layernorm", "norm")},
        {
            "target_modules": [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 3) for name in "qv"],
            "modules_to_save": ["input_layernorm", "model.norm"],
        },
    ),
    "tied embedding": ("llama", {"rank": 3, "targets": "embed_tokens,q_proj"}, {"modules_to_save": None}),
    "scaled embedding": ("gemma3", {"rank": 3, "targets": "embed_tokens"}, {"target_modules": ["embed_tokens"]}),
    "untied embedding and head": (
        UNTIED,
        {"rank": 3, "targets": "embed_tokens,lm_head,v_proj"},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    ),
    "head and norms whole": (
        UNTIED,
        {"rank": 3, "modules_to_save": ("lm_head", "norm", "input_layernorm")},
        {"modules_to_save": ["input_layernorm", "lm_head", "model.norm"]},
    ),
    "tied embedding whole": (
        "llama",
        {"rank": 3, "modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "a norm with a bias, whole": ("gpt2", {"rank": 2, "modules_to_save": ("norm",)}, {"modules_to_save": ["ln_f"]}),
    "pissa": (
        "llama",
        {"rank": 3, "alpha": 5.0, "init": "pissa"},
        {"r": 6, "lora_alpha": 10, "init_lora_weights": True},
    ),
    "pissa, dora, rslora, dropout": (
        "llama",
        {"rank": 4, "alpha": 6.0, "init": "pissa", "kind": "dora", "rslora": True, "dropout": 0.1},
        {"r": 8, "lora_dropout": 0.1, "use_dora": True},
    ),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_computes_what_we_do(kind, root, tmp_path, record_figure):
    name, settings, wanted = OURS[kind]
    base, config = base_of(name, root), config_of(**settings)
    variables, trained = variables_of(base, config)
    variables = trained_a_little(variables, trained)
    said = written(tmp_path / "out", base, config, variables)
    assert {key: said[key] for key in wanted} == wanted
    model = PeftModel.from_pretrained(torch_base(name, root), tmp_path / "out")
    ours, theirs = our_logits(base, variables), torch_logits(model)
    record_figure("largest logit difference", np.abs(ours - theirs).max())
    assert np.abs(ours - plain_logits(name, root)).max() > 0.1  # so that a lost part shows
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # And back, into a run that goes on from it.
    again, paths = variables_of(base, config_of(source=str(tmp_path / "out"), dropout=config.adapter.dropout))
    np.testing.assert_allclose(our_logits(base, again), ours, rtol=0, atol=1e-4)
    assert sorted(paths) == sorted(trained)
    if config.adapter.init != "pissa":
        mine, theirs = tree.flatten(variables["lora"]), tree.flatten(again["lora"])
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[path], np.where(adapted(mine, path), theirs[path], mine[path])) for path in mine)
    # It has in use what is in the file, all of it and nothing else.
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(tmp_path / "out/adapter_model.safetensors")
    assert live.keys() == file.keys()
    assert all(np.array_equal(live[key].numpy(), file[key]) for key in file)


def test_ranks_and_scales_that_layers_differ_in_make_patterns_of_layers(root, tmp_path):
    base, config = base_of("llama", root), config_of(rank=3, targets="q_proj,up_proj", rslora=True)
    variables = trained_a_little(*variables_of(base, config))
    leaves = tree.flatten(variables["lora"])
    leaves["layers/mlp/up_proj/lora_scale"] = np.array([1.5, 2.25, 32 / 3**0.5], np.float32)
    variables["lora"] = tree.unflatten(leaves)
    said = written(tmp_path / "out", base, config, variables)
    assert said["rank_pattern"] == {}
    assert list(said["alpha_pattern"]) == [rf"model\.layers\.{i}\.mlp\.up_proj" for i in (0, 1)]
    model = PeftModel.from_pretrained(torch_base("llama", root), tmp_path / "out")
    np.testing.assert_allclose(our_logits(base, variables), torch_logits(model), rtol=0, atol=1e-4)
    again = tree.flatten(variables_of(base, config_of(source=str(tmp_path / "out")))[0]["lora"])
    assert np.array_equal(again["layers/mlp/up_proj/lora_scale"], leaves["layers/mlp/up_proj/lora_scale"])


@pytest.mark.parametrize("kind", ["patterns", "pissa"])
def test_for_vllm_there_is_one_rank_and_one_alpha(kind, root, tmp_path):
    name, settings, _ = OURS[kind]
    base, config = base_of(name, root), config_of(**settings)
    variables = trained_a_little(*variables_of(base, config))
    plain = uniform(variables["lora"], ())
    write_adapter(tmp_path / "out", plain, base.model.spec, assemble.base_facts(config, base))
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (said["rank_pattern"], said["alpha_pattern"], said["modules_to_save"]) == ({}, {}, None)
    assert said["r"] == said["lora_alpha"] == {"patterns": 4, "pissa": 6}[kind]
    model = PeftModel.from_pretrained(torch_base(name, root), tmp_path / "out")
    np.testing.assert_allclose(our_logits(base, variables), torch_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "dora", "targets": "q_proj"}, "DoRA"),
        ({"targets": "q_proj", "modules_to_save": ("norm",)}, "modules_to_save"),
        ({"targets": "embed_tokens"}, "an adapter of the embedding"),
        ({"targets": "q_proj", "rank": 17}, r"rank 17 \(over --vllm_rank=16"),
    ],
)
def test_what_vllm_does_not_do_is_refused(settings, words, root):
    base = base_of("llama", root)
    abstract, _ = assemble.abstract_variables(config_of(**settings), base.model, one_device())
    whole = assemble.trained_whole(config_of(**settings), base)
    with pytest.raises(UserError, match=words):
        uniform(abstract["lora"], whole)


THEIRS = {
    "dora, rslora": ("llama", {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}),
    "dora of conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "patterns, between layers too": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {r"layers\.[02]\..*": 3, "v_proj": 8},
            "lora_dropout": 0.2,
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": (UNTIED, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole modules": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "whole tied embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "unlike layers": (
        "qwen3_moe, every second layer",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.up_proj.weight"],
            "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 8},
        },
    ),
    "every layer by number": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2]}),
    "some layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "one layer, DoRA, by the name of the list": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": 1, "layers_pattern": "h", "use_dora": True},
    ),
    "some layers and others by name": (
        UNTIED,
        {"target_modules": ["lm_head", "model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    ),
    "some of unlike layers": (
        "qwen3_moe, every second layer",
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    ),
}


def of_peft(name, root, out, **settings):
    """A peft model of random trained values, saved in `out`."""
    model = get_peft_model(torch_base(name, root), LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or "lora_embedding" in parameter_name or "modules_to_save" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if "magnitude" in parameter_name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    model.eval().save_pretrained(out)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_we_compute_what_peft_does(kind, root, tmp_path, record_figure):
    name, settings = THEIRS[kind]
    model = of_peft(name, root, tmp_path, **settings)
    base, config = base_of(name, root), config_of(source=str(tmp_path))
    variables, trained = variables_of(base, config)
    ours, theirs = our_logits(base, variables), torch_logits(model)
    record_figure("largest logit difference", np.abs(ours - theirs).max())
    assert np.abs(ours - plain_logits(name, root)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert sum(np.size(tree.flatten(variables)[path]) for path in trained) >= sum(
        parameter.numel() for _, parameter in model.named_parameters() if parameter.requires_grad
    ) - (base.model.spec.vocab_size * base.model.spec.hidden_size if "tied" in kind else 0)
    # Trained further here, it is read by peft.
    variables = trained_a_little(variables, trained)
    written(tmp_path / "further", base, config, variables)
    further = PeftModel.from_pretrained(torch_base(name, root), tmp_path / "further")
    ours = our_logits(base, variables)
    assert np.abs(ours - theirs).max() > 0.05
    np.testing.assert_allclose(ours, torch_logits(further), rtol=0, atol=1e-4)


def test_ranks_filled_up_with_zeros_stay_zero_in_training(root, tmp_path):
    of_peft("llama", root, tmp_path, target_modules=["q_proj"], rank_pattern={r"layers\.1\.self_attn\.q_proj": 5})
    base = base_of("llama", root)
    variables, _ = variables_of(base, config_of(source=str(tmp_path)))
    params = {"params": variables["params"]}
    batch = batch_of([[(TOKENS, np.ones(len(TOKENS), bool))]], len(TOKENS))

    def loss(lora):
        hidden, _ = base.model.apply(params | {"lora": lora}, batch["tokens"], batch["positions"], batch["segment_ids"])
        return (hidden**2).sum()

    gradient = tree.flatten(jax.jit(jax.grad(loss))(variables["lora"]))
    a, b = (np.asarray(gradient[f"layers/self_attn/q_proj/lora_{half}"]) for half in "ab")
    assert a.shape[-1] == 5
    for layer, rank in enumerate((3, 5, 3)):
        assert a[layer, :, :rank].any(axis=0).all()
        assert b[layer, :rank].any(axis=1).all()
        assert not a[layer, :, rank:].any()
        assert not b[layer, rank:].any()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "missing: .*lm_head.weight"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "not used: .*lm_head"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "not used: .*lm_head.lora_A"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying"),
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA of the token embedding"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_what_is_not_the_same_here_is_refused(name, settings, words, root, tmp_path):
    of_peft(name, root, tmp_path, **settings)
    with pytest.raises(UserError, match=words):
        open_adapter(tmp_path, base_of(name, root).model.spec)


def test_an_embedding_and_a_tied_head_trained_apart_are_refused(root, tmp_path):
    of_peft("llama", root, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(UserError, match="embedding and output head were trained apart"):
        open_adapter(tmp_path, base_of("llama", root).model.spec)


@pytest.fixture(scope="module")
def ours(root, tmp_path_factory):
    """An adapter directory of ours, with the embedding adapted."""
    out = tmp_path_factory.mktemp("ours") / "adapter"
    base, config = base_of("llama", root), config_of(rank=2, targets="embed_tokens,q_proj")
    written(out, base, config, trained_a_little(*variables_of(base, config)))
    return out


@pytest.mark.parametrize("path", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_an_adapter_of_another_base_of_the_same_shape_names_both(ours, root, tmp_path, path):
    base = base_of("llama", root)
    shutil.copytree(base.path, tmp_path / "other")
    stored = load_file(tmp_path / "other/model.safetensors")
    stored[path] = stored[path] * np.float32(1.001)
    save_file(stored, tmp_path / "other/model.safetensors", {"format": "pt"})
    other = base._replace(source="other", reader=open_source(tmp_path / "other"))
    with pytest.raises(UserError, match="trained on 'llama', and the model here, 'other'"):
        variables_of(other, config_of(source=str(ours)))


def test_by_the_embedding_that_peft_keeps_another_base_is_found_out(root, tmp_path):
    of_peft("llama", root, tmp_path, target_modules=["embed_tokens"])
    base, file = base_of("llama", root), tmp_path / "adapter_model.safetensors"
    variables_of(base, config_of(source=str(tmp_path)))
    stored = load_file(file)
    stored["base_model.model.model.embed_tokens.base_layer.weight"] += 0.01
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(UserError, match="has the same shapes but other weights"):
        variables_of(base, config_of(source=str(tmp_path)))


def test_the_digest_of_a_base_is_that_of_its_values(root, tmp_path):
    base = base_of("llama", root)
    torch_base("llama", root).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    digest = base_digest(base.reader, base.model.spec)
    assert base_digest(open_source(tmp_path), base.model.spec) == digest
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8}, r"adapter.rank=8 \(there it is 2\)"),
        ({"alpha": 8.0}, r"adapter.alpha=8.0 \(there it is 32.0\)"),
        ({"kind": "dora"}, r"adapter.kind='dora' \(there it is 'lora'\)"),
        ({"rslora": True}, r"adapter.rslora=True"),
        ({"targets": "q_proj,v_proj"}, "adapter.targets='q_proj,v_proj'"),
        ({"rank_pattern": (("q_proj", 4),)}, "adapter.rank_pattern="),
        ({"modules_to_save": ("norm",)}, "adapter.modules_to_save="),
        ({"init": "pissa"}, "adapter.init='pissa'"),
        ({"kind": "none"}, "adapter.kind='none' has none"),
    ],
)
def test_config_keys_that_contradict_the_directory_are_named(ours, root, settings, words):
    with pytest.raises(UserError, match=words):
        assemble.abstract_variables(config_of(source=str(ours), **settings), base_of("llama", root).model, one_device())


def test_config_keys_that_agree_with_the_directory_are_no_contradiction(ours, root):
    config = config_of(source=str(ours), rank=2, dropout=0.0)
    assert continued.stored_adapter(config, base_of("llama", root).model.spec).settings.rank == 2
    effective = continued.effective(config_of(source=str(ours)), base_of("llama", root).model.spec)
    assert (effective.adapter.rank, effective.adapter.targets) == (2, "embed_tokens,q_proj")


def test_the_digest_of_an_adapter_is_that_of_its_files_wherever_they_are(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "adapter")
    assert directory_digest(tmp_path / "adapter") == directory_digest(ours)
    file = tmp_path / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert directory_digest(tmp_path / "adapter") != directory_digest(ours)


@pytest.mark.parametrize("layers", ["", "1"])
def test_a_run_goes_on_from_adapters_of_experts(root, tmp_path, layers):
    base, config = base_of("mixtral", root), config_of(rank=2, targets="experts/(gate|down)_proj", layers=layers)
    variables, _ = variables_of(base, config)
    written(tmp_path / "out", base, config, variables)
    again, _ = variables_of(base, config_of(source=str(tmp_path / "out")))
    jax.tree.map(np.testing.assert_array_equal, again["lora"], variables["lora"])
