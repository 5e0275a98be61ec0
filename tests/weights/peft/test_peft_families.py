"""Adapters of every kind of family in the real `peft`: the same logits, and no layer adapted that was not trained."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.family_configs import CONFIGS
from support.model_dirs import with_scale
from support.more_configs import MORE_CONFIGS
from support.peft_case import ALPHA, BASE, RANK, TOKENS, Case, fresh, read, saved_by_peft, torch_logits, write
from support.tiny import batch_of, logits
from support.torch_models import torch_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from ftjax import tree
from ftjax.errors import UserError
from ftjax.models.families import is_inside, spec_from_config
from ftjax.weights.peft.adapter import open_adapter, write_adapter

pytestmark = [
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It sets fan_in_fan_out right for each layer, and says so where the config's is another.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

_LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
_UNGATED = ["down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
_ONE_UP = ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
_MIXTURE = ["k_proj", "o_proj", "q_proj", "shared_expert_gate", "v_proj"]
_PER_LAYER = ["per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"]
_ALTUP = [f"altup_{name}projections.{number}" for name in ("", "unembed_") for number in range(2)]
_ALTUP += ["correction_coefs", "linear_left", "linear_right", "modality_router", "prediction_coefs"]
NAMES = {
    "llama": _LLAMA,
    "phi": ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"],
    "starcoder2": ["c_fc", "c_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen2_moe": _MIXTURE,
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gemma3": _LLAMA,
    "gemma4": sorted([*_LLAMA, *_PER_LAYER]),
    "gemma4, experts, double wide": sorted(["k_proj", "o_proj", "q_proj", "v_proj", *_PER_LAYER]),
    "mixtral": _ATTENTION,
    "qwen3_moe, a dense layer first": _ATTENTION,
    "qwen3_5": sorted([*_LLAMA, *(f"in_proj_{name}" for name in ("a", "b", "qkv", "z")), "out_proj"]),
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}
# Those of which each has the names of another above.
MORE = {"apertus": _UNGATED, "arcee": _UNGATED, "nemotron": _UNGATED, "glm": _ONE_UP, "glm4": _ONE_UP}
MORE |= dict.fromkeys(("cohere2", "ernie4_5", "exaone4", "helium", "hunyuan_v1_dense", "ministral"), _LLAMA)
MORE |= {"gemma3n": sorted([*_LLAMA, *_PER_LAYER, *_ALTUP])}
MORE |= dict.fromkeys(("ministral3", "olmo", "olmo3", "seed_oss", "stablelm"), _LLAMA)
MORE |= dict.fromkeys(("ernie4_5_moe", "granitemoe", "hunyuan_v1_moe", "llama4", "minimax_m2", "phimoe"), _ATTENTION)
MORE["lfm2"] = ["in_proj", "k_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
MORE["falcon_h1"] = sorted([*_LLAMA, "in_proj"])
MORE["granitemoehybrid"] = sorted([*_ATTENTION, "in_proj"])
MORE["nemotron_h"] = sorted([*_ATTENTION, "in_proj"])
MORE["qwen3_next"] = sorted([*_MIXTURE, "in_proj_ba", "in_proj_qkvz", "out_proj"])
NAMES |= MORE
# What peft would take for experts by the name of its module.
_SHARED = [f"shared_expert.{name}_proj.weight" for name in ("down", "gate", "up")]
_DENSE_AND_SHARED = [f"{of}.{name}_proj.weight" for of in ("mlp", "shared_experts") for name in ("down", "gate", "up")]
PARAMETERS = {
    "granitemoehybrid": ["shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"],
    "hunyuan_v1_moe": [f"shared_mlp.{name}_proj.weight" for name in ("down", "gate", "up")],
    "nemotron_h": [
        *(f"mixer.{name}_proj.weight" for name in ("down", "up")),
        *(f"shared_experts.{name}_proj.weight" for name in ("down", "up")),
    ],
    "llama4": ["down_proj.weight", "gate_proj.weight", "up_proj.weight"],
    "qwen2_moe": _SHARED,
    "qwen3_next": _SHARED,
    "gemma4, experts, double wide": ["down_proj.weight", "gate_proj.weight", "up_proj.weight"],
    "qwen3_moe, a dense layer first": ["mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "deepseek_v3": _DENSE_AND_SHARED,
    "ernie4_5_moe": _DENSE_AND_SHARED,
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.fixture(scope="module", params=[*(name for name in NAMES if name not in MORE), *SLOW])
def case(request, tmp_path_factory):
    case = Case(torch_model(CONFIGS[request.param]), tmp_path_factory.mktemp("case"))
    case.name, case.ours = request.param, case.adapters("all-linear")
    adapted = [(path, leaf) for path, leaf in tree.flatten(case.ours).items() if path.endswith("lora_a")]
    case.layers = sum(len(leaf) if path.startswith("layers/") else 1 for path, leaf in adapted)
    return case


def adapted_layers(model):
    return sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A"))


def test_peft_computes_what_we_do_from_what_we_write(case, tmp_path, record_figure):
    write(tmp_path / "out", case.ours, case.spec)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == NAMES[case.name]
    assert config.get("target_parameters") == PARAMETERS.get(case.name)
    assert config["fan_in_fan_out"] is (case.name == "gpt2")
    model = PeftModel.from_pretrained(fresh(case), tmp_path / "out")
    assert len(adapted_layers(model)) == case.layers
    ours, theirs = case.logits(case.ours), torch_logits(model)
    record_figure("largest logit difference", np.abs(ours - theirs).max())
    assert np.abs(ours - case.logits()).max() > 0.5  # so that a lost adapter shows
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_we_compute_what_peft_does_from_what_it_writes(case, tmp_path, record_figure):
    # peft's own "all-linear" takes of a mixture the experts too, which are refused here, and in Mamba what it refuses.
    targets = NAMES[case.name] if case.spec.experts or case.spec.mamba else "all-linear"
    parameters = PARAMETERS.get(case.name)
    model = saved_by_peft(case, tmp_path, targets, parameters)
    ours, settings = read(tmp_path, case.spec)
    assert (settings.rank, settings.alpha) == (RANK, ALPHA)
    jax.tree.map(lambda a, b: a.shape == b.shape, ours, case.ours)  # the same layers: raises otherwise
    found, theirs = case.logits(ours), torch_logits(model)
    record_figure("largest logit difference", np.abs(found - theirs).max())
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return Case(torch_model(MORE_CONFIGS["gpt2, plain, relu"]), tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["o_proj"], ["attn.c_proj"]),
        (["down_proj", "qkv_proj"], ["c_attn", "mlp.c_proj"]),
        (["o_proj", "down_proj"], ["c_proj"]),
        (r"lm_head|up_proj", ["c_fc", "lm_head"]),
    ],
)
def test_of_two_layers_of_one_name_only_the_trained_one_is_adapted(gpt2, tmp_path, targets, names, record_figure):
    ours = gpt2.adapters(targets)
    write(tmp_path / "out", ours, gpt2.spec)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == names
    model = PeftModel.from_pretrained(fresh(gpt2), tmp_path / "out")
    endings = tuple(f".{name}" for name in names)
    layers = adapted_layers(model)
    assert len(layers) == sum(2 if name != "lm_head" else 1 for name in names) * (2 if names == ["c_proj"] else 1)
    assert all(name.endswith(endings) for name in layers)
    difference = np.abs(gpt2.logits(ours) - torch_logits(model)).max()
    record_figure("largest logit difference", difference)
    assert difference < 1e-4
    again, _ = read(tmp_path / "out", gpt2.spec)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_an_adapter_of_the_language_model_of_mistral3(tmp_path, record_figure):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(
        text_config=dict(CONFIGS["ministral3"]), vision_config=vision, image_token_index=60, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    case = Case(Mistral3ForConditionalGeneration(config).eval(), tmp_path / "model")
    ours = case.adapters("q_proj,down_proj")
    write(tmp_path / "out", ours, case.spec, multimodal=True)
    adapted = PeftModel.from_pretrained(fresh(case), tmp_path / "out")
    assert len(adapted_layers(adapted)) == 2 * 3
    difference = np.abs(case.logits(ours) - torch_logits(adapted)).max()
    record_figure("largest logit difference", difference)
    assert np.abs(case.logits(ours) - case.logits()).max() > 0.05
    assert difference < 1e-4
    again, _ = read(tmp_path / "out", case.spec)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_the_language_model_of_a_multimodal_one(tmp_path, record_figure):
    """Gemma 3 as AutoModelForCausalLM gives it: a vision tower, with a q_proj of its own, beside the language model."""
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key not in ("model_type", "rope_scaling")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), 7)
    vision = sizes | {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    ).eval()
    case = Case(model, tmp_path / "model")
    ours = case.adapters("q_proj,down_proj")
    write(tmp_path / "out", ours, case.spec, multimodal=True)
    adapted = PeftModel.from_pretrained(fresh(case), tmp_path / "out")
    assert len(adapted_layers(adapted)) == 2 * 4
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["alpha_pattern"] == {}
    assert all(".language_model." in name for name in adapted_layers(adapted))
    difference = np.abs(case.logits(ours) - torch_logits(adapted)).max()
    record_figure("largest logit difference", difference)
    assert np.abs(case.logits(ours) - case.logits()).max() > 0.05
    assert difference < 1e-4
    again, _ = read(tmp_path / "out", case.spec)
    jax.tree.map(np.testing.assert_array_equal, again, ours)
    # With an alpha of its own for q_proj, of which the vision tower has one too, and the last norm trained whole.
    leaves, params = tree.flatten(with_scale(ours, ALPHA / RANK)), tree.flatten(case.params)
    leaves["layers/self_attn/q_proj/lora_scale"] = leaves["layers/self_attn/q_proj/lora_scale"] * 2
    params["norm/scale"] = params["norm/scale"] + 0.25
    saved = {"norm/scale": params["norm/scale"]}
    write_adapter(tmp_path / "more", tree.unflatten(leaves), case.spec, BASE, saved=saved, multimodal=True)
    config = json.loads((tmp_path / "more/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.language_model.norm"]
    adapted = PeftModel.from_pretrained(fresh(case), tmp_path / "more")
    batch = batch_of([[(TOKENS, np.ones(len(TOKENS), bool))]], len(TOKENS))
    variables = {"params": tree.unflatten(params), "lora": tree.unflatten(leaves)}
    assert np.abs(logits(case.decoder, variables, batch)[0] - torch_logits(adapted)).max() < 1e-4
    stored = open_adapter(tmp_path / "more", case.spec)
    lora_again, saved_again = stored.read()
    jax.tree.map(np.testing.assert_array_equal, lora_again, tree.unflatten(leaves))
    np.testing.assert_array_equal(saved_again["norm/scale"], params["norm/scale"])


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_the_language_model_of_qwen3_5(tmp_path, whole, record_figure):
    """AutoModelForCausalLM loads it alone; it is inside in what loads the whole, and so in a reward model."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16}
    text = {key: value for key, value in CONFIGS["qwen3_5"].items() if key != "model_type"}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    case = Case(model, tmp_path / "model")
    ours = case.adapters("all-linear")
    write(tmp_path / "out", ours, case.spec, multimodal=is_inside({"model_type": "qwen3_5"}, whole))
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    base = auto.from_pretrained(case.path, attn_implementation="eager").eval()
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    layers = sum(len(leaf) for path, leaf in tree.flatten(ours).items() if path.endswith("lora_a"))
    assert len(adapted_layers(adapted)) == layers
    difference = np.abs(case.logits(ours) - torch_logits(adapted)).max()
    record_figure("largest logit difference", difference)
    assert np.abs(case.logits(ours) - case.logits()).max() > 0.1
    assert difference < 1e-4
    again, _ = read(tmp_path / "out", case.spec)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


def test_what_peft_itself_refuses_in_a_family_is_not_written(tmp_path):
    case = torch_model(CONFIGS["falcon_h1"])
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(case, LoraConfig(r=2, target_modules=["out_proj"]))
    shapes = {"lora_a": (3, 40, RANK), "lora_b": (3, RANK, 32)}
    ours = {f"layers/mamba/out_proj/{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(UserError, match="layers/mamba/out_proj: peft takes no adapter of it in a falcon_h1 model"):
        write(tmp_path / "out", tree.unflatten(ours), spec_from_config(CONFIGS["falcon_h1"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_adapters_of_experts_are_refused_by_name(tmp_path):
    model = torch_model(CONFIGS["mixtral"])
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not supported: .*target_parameters="):
        read(tmp_path, spec_from_config(CONFIGS["mixtral"]))


def test_a_layer_that_a_target_names_and_the_file_lacks_is_missing(gpt2, tmp_path):
    """The name c_proj stands for two layers of GPT-2."""
    write(tmp_path / "out", gpt2.adapters(["o_proj"]), gpt2.spec)
    file = tmp_path / "out/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["c_proj"]}))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "out", gpt2.spec)
    assert str(caught.value).count("missing: base_model.model.transformer.h.") == 4
    assert str(caught.value).count(".mlp.c_proj.lora_") == 4
