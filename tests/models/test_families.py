"""From `config.json` to a DecoderSpec, and what is refused on the way."""

import copy

import pytest
from support.family_configs import CONFIGS, LANGUAGE_MODELS
from support.more_configs import MORE_CONFIGS
from support.tiny import CONFIG, spec
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ftjax.errors import UserError
from ftjax.models.families import FAMILIES, is_inside, spec_from_config, text_config
from ftjax.models.groups import groups, stacks
from ftjax.models.published import configs

ALL_CONFIGS = CONFIGS | MORE_CONFIGS
PUBLISHED = configs()


def completed(config):
    """What transformers makes of a config: its defaults filled in, its present spelling."""
    # A copy: transformers writes into the dicts that it is given.
    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    return AutoConfig.for_model(config["model_type"], **fields).to_dict()


@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS.keys())
def test_old_and_new_spelling_give_the_same_spec(config):
    assert spec_from_config(completed(config)) == spec_from_config(config)


@pytest.mark.parametrize("family", sorted(LANGUAGE_MODELS))
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family):
    config = {"model_type": family, "vocab_size": 64, "num_hidden_layers": 7}
    config |= {"hidden_size": 256, "intermediate_size": 48, "num_attention_heads": 32}
    if family == "helium":  # which has 20 heads of keys and values where nothing is said
        config["num_attention_heads"] = 40
    if family == "gemma3n_text":  # the last 15 of whose layers use the keys of others
        config["num_hidden_layers"] = 25
    if family == "granitemoehybrid":  # all of whose layers are Mamba-2's where nothing is said
        config["layer_types"] = ["mamba"] * 6 + ["attention"]
    if family == "nemotron_h":  # whose layers are as many as are listed
        config["layers_block_type"] = ["mamba", "moe", "attention", "mlp", "mamba", "mlp", "moe"]
    if family == "gpt2":
        config = {"model_type": family, "vocab_size": 64, "n_embd": 64, "n_layer": 7, "n_head": 4}
    assert spec_from_config(config) == spec_from_config(completed(config))


def test_layers_of_released_models_differ_where_they_should():
    def windows(name):
        return spec_from_config(PUBLISHED[name]).layer_windows

    assert windows("gemma-2-9b")[:4] == (4096, None, 4096, None)
    assert windows("gemma-3-1b")[:7] == (512, 512, 512, 512, 512, None, 512)
    assert windows("gpt-oss-20b")[:3] == (128, None, 128)
    assert windows("Mistral-7B-v0.1") == (4096,) * 32
    assert set(windows("Qwen2.5-7B")) == {None}
    gemma3 = spec_from_config(PUBLISHED["gemma-3-1b"])
    assert gemma3.layer_ropes[:7] == (1, 1, 1, 1, 1, 0, 1)
    assert gemma3.ropes[0].frequencies[1] < gemma3.ropes[1].frequencies[1]
    smollm3 = spec_from_config(PUBLISHED["SmolLM3-3B"])
    assert smollm3.layer_ropes[:8] == (0, 0, 0, None) * 2


def test_the_language_model_of_a_multimodal_gemma3():
    text = PUBLISHED["gemma-3-1b"]
    inner = {name: value for name, value in text.items() if name != "model_type"}
    config = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "eos_token_id": [1, 106]}
    assert spec_from_config(config) == spec_from_config(text)
    assert spec_from_config(text_config(config)) == spec_from_config(text)
    assert text_config(config)["eos_token_id"] == [1, 106]
    assert text_config(text) is text
    with pytest.raises(UserError, match="lacks 'text_config'"):
        spec_from_config({"model_type": "gemma3"})


def test_the_language_model_of_a_multimodal_llama4():
    text = CONFIGS["llama4"]
    config = {"model_type": "llama4", "text_config": text, "vision_config": {}}
    assert spec_from_config(config) == spec_from_config(text)
    assert text_config(config)["architectures"] == ["Llama4ForCausalLM"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.language_models])
def test_where_transformers_has_the_language_model_of_a_multimodal_one(name):
    """And so peft: in the multimodal model, or alone."""
    alone = [FAMILIES[text].architecture for text in FAMILIES[name].language_models]
    assert is_inside({"model_type": name}) is (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) not in alone)
    assert is_inside({"model_type": name}, whole=True)
    assert not is_inside({"model_type": FAMILIES[name].language_models[0]}, whole=True)


def test_layers_of_a_nemotron_h_by_its_pattern():
    """That of Nemotron-H-8B: bodies to compile are few, however it goes."""
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    config = {name: value for name, value in CONFIGS["nemotron_h"].items() if name != "layers_block_type"}
    spec = spec_from_config(config | {"num_hidden_layers": 52, "hybrid_override_pattern": pattern})
    assert [kind.name for kind in spec.layer_kinds][:9] == ["mamba", "mlp"] * 3 + ["mamba", "full", "mlp"]
    assert len(stacks(spec)) < 20
    alone = [stack.spec for stack in stacks(spec)]
    assert {(one.attends, one.carries, one.only) for one in alone} == {
        (False, True, "mixer"),
        (True, False, "mixer"),
        (False, False, "mlp"),
    }


def test_layers_of_llama4_scout_and_maverick():
    sizes = {"num_hidden_layers": 8, "vocab_size": 64, "num_attention_heads": 40}
    scout = spec_from_config({"model_type": "llama4_text"} | sizes)
    assert scout.layer_chunks == (8192, 8192, 8192, None) * 2
    assert scout.layer_ropes == (0, 0, 0, None) * 2
    assert [group.name for group in groups(scout)] == [""]  # one body for all layers
    maverick = spec_from_config({"model_type": "llama4_text", "interleave_moe_layer_step": 2} | sizes)
    assert [kind.name for kind in maverick.layer_kinds] == ["dense", "sparse"] * 4
    assert [stack.spec.experts is None for stack in stacks(maverick)] == [True, False]
    assert [stack.spec.intermediate_size for stack in stacks(maverick)] == [16_384, 8192]


def test_the_language_model_inside_may_be_of_several_families():
    text = CONFIGS["ministral3"]
    config = {"model_type": "mistral3", "text_config": text}
    assert spec_from_config(config) == spec_from_config(text)
    assert text_config(config)["architectures"] == ["Ministral3ForCausalLM"]
    plain = {name: value for name, value in CONFIGS["mistral"].items() if name != "model_type"}
    assert spec_from_config({"model_type": "mistral3", "text_config": plain}).family == "mistral"
    with pytest.raises(UserError, match="a language model 'llama' in it, only of mistral, ministral3"):
        spec_from_config({"model_type": "mistral3", "text_config": CONFIGS["llama"]})


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_theta_of_old_and_new_configs(rope):
    without = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    frequencies = spec_from_config(without | rope).ropes[0].frequencies
    assert frequencies == pytest.approx([1.0, 5e5**-0.25, 5e5**-0.5, 5e5**-0.75])
    assert spec_from_config(without) == spec()  # 10,000


def test_what_is_said_twice_counts_as_transformers_has_it():
    """`rope_scaling` before `rope_parameters`, Gemma 3's own word on ties, settings that do nothing."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    qwen3 = CONFIGS["qwen3"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    both = qwen3 | {"rope_scaling": yarn}
    assert spec_from_config(both) == spec_from_config(completed(both)) != spec_from_config(qwen3)

    flat = CONFIGS["gemma3"] | {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}
    assert spec_from_config(flat | {"rope_scaling": None}) == spec_from_config(
        CONFIGS["gemma3"] | {"rope_scaling": None}
    )
    text = {name: value for name, value in PUBLISHED["gemma-3-1b"].items() if name != "model_type"}
    config = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    assert spec_from_config(config).tie_word_embeddings is False
    assert text_config(config)["tie_word_embeddings"] is False

    for name, change in (
        ("mistral", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 0}),
        ("gemma2", {"hidden_act": "gelu"}),
    ):
        config = CONFIGS[name] | change
        assert spec_from_config(config) == spec_from_config(completed(config)), name
    short = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    other = {short.get(name, name): value for name, value in CONFIGS["gpt2"].items()}
    assert spec_from_config(other) == spec_from_config(CONFIGS["gpt2"])


def test_the_first_spelling_of_longrope():
    config = PUBLISHED["Phi-3-mini-128k"]
    old = config | {"rope_scaling": config["rope_scaling"] | {"type": "su"}}
    assert spec_from_config(old) == spec_from_config(config)
    assert spec_from_config(config).ropes[0].long_after == 4096


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (
            CONFIG,
            {"model_type": "mamba"},
            "'mamba'. Its config resembles that of a 'llama' model most, which reads all of it",
        ),
        (CONFIG, {"model_type": None}, "model_type None. Its config resembles"),
        (CONFIG, {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type 'dynamic'"),
        (CONFIG, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'"),
        (CONFIG, {"rope_scaling": {"type": "linear", "factor": "two"}}, "not usable"),
        (CONFIG, {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "4 numbers"),
        (CONFIG, {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        (CONFIG, {"num_key_value_heads": 3}, "not a multiple"),
        (CONFIG, {"vocab_size": 0}, "vocab_size"),
        (CONFIG, {"hidden_size": "32"}, "hidden_size"),
        (CONFIG, {"attention_bias": "yes"}, "attention_bias='yes'"),
        (CONFIG, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        (CONFIG, {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
        (CONFIG, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (CONFIG, {"model_type": ["llama"]}, "no port of model_type ['llama']"),
        (CONFIG, {"hidden_act": [1]}, "hidden_act=[1]"),
        (CONFIG, {"rope_scaling": "x"}, "not an object"),
        (CONFIG, {"rms_norm_eps": 10**400}, "a number of 1329 bits"),
        (CONFIG, {"rms_norm_eps": -1}, "rms_norm_eps=-1.0 is not positive"),
        (CONFIG, {"rope_theta": 10**400}, "not usable"),
        (CONFIG, {"rope_theta": 0}, "not usable"),
        (CONFIG, {"rope_theta": float("nan")}, "not usable"),
        (CONFIG, {"rope_theta": "4"}, "not usable"),
        (CONFIG, {"rope_scaling": {"type": "linear", "factor": 0}}, "not usable"),
        (CONFIG, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (CONFIG, {"head_dim": 7}, "heads of 7 dimensions"),
        (CONFIG, {"head_dim": 10**9}, "heads of 1000000000 dimensions"),
        (CONFIG, {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (CONFIGS["phi3"], {"partial_rotary_factor": 1e400}, "not usable"),
        (CONFIGS["phi3"], {"partial_rotary_factor": 4}, "not usable"),
        (CONFIGS["gemma2"], {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0.0 is not positive"),
        (CONFIGS["gemma3"], {"rope_parameters": -1}, "are objects"),
        (CONFIGS["granite"], {"logits_scaling": 0}, "logits_scaling=0.0 is not positive"),
        (CONFIGS["gpt2"], {"n_head": 5}, "n_embd=36 is not a multiple of n_head=5"),
        (CONFIGS["smollm3"], {"no_rope_layers": []}, "0 or 1 for each of 3 layers"),
        (CONFIGS["qwen2"], {"max_window_layers": -1}, "max_window_layers=-1"),
        (CONFIGS["gemma3"], {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (CONFIGS["gemma2"], {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        (CONFIGS["gemma2"], {"layer_types": ["full_attention"]}, "has to name 3 layers"),
        (CONFIGS["gpt2"], {"add_cross_attention": True}, "add_cross_attention"),
        (CONFIGS["qwen3_moe"], {"mlp_only_layers": ["0"]}, "mlp_only_layers=['0'] is not a list of numbers"),
        (CONFIGS["qwen3_moe"], {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a positive whole number"),
        (CONFIGS["phi3"], {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'phi3' model needs 'short_factor'"),
        (CONFIGS["gemma3"], {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "=0.5"),
        (CONFIGS["qwen3_moe"], {"num_experts_per_tok": 6}, "6 experts per token of only 5"),
        (CONFIGS["gemma4"], {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        (CONFIGS["gemma4"], {"num_kv_shared_layers": 4}, "num_kv_shared_layers=4 of 5 layers leaves none before them"),
        (
            CONFIGS["gemma4"],
            {"per_layer_config": {"2": {"head_dim": 8, "hidden_size": 4}}},
            "per_layer_config of layer 2",
        ),
        (
            CONFIGS["gemma4"],
            {"per_layer_config": {"2": {"head_dim": 8}, "4": {"head_dim": 4}}},
            "heads of unlike shapes",
        ),
        (CONFIGS["gemma4"], {"vocab_size_per_layer_input": 60}, "vocab_size_per_layer_input of a Gemma 4 is less"),
        (CONFIGS["gemma4"], {"global_head_dim": 9}, "4 heads do not go with {'head_dim': 9"),
        (CONFIGS["gemma3n"], {"altup_active_idx": 3}, "altup_active_idx=3 of altup_num_inputs=3"),
        (CONFIGS["gemma3n"], {"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern has 1 numbers"),
        (CONFIGS["gemma3n"], {"activation_sparsity_pattern": [0, 0, 0, 2]}, "activation_sparsity_pattern has 2"),
        (CONFIGS["gemma3n"], {"hidden_size_per_layer_input": 0}, "without hidden_size_per_layer_input"),
        (CONFIGS["mistral"], {"sliding_window": -1}, "sliding_window=-1"),
        (CONFIGS["llama4"], {"no_rope_layers": [1]}, "0 or 1 for each of 4 layers"),
        (CONFIGS["llama4"], {"moe_layers": "all"}, "moe_layers='all' is not a list"),
        (CONFIGS["hunyuan_v1_moe"], {"moe_topk": [2, 2, 1]}, "moe_topk=[2, 2, 1] is not the same in all layers"),
        (CONFIGS["hunyuan_v1_moe"], {"num_shared_expert": [2, 2, 2]}, "num_shared_expert=2"),
        (CONFIGS["qwen3_5"], {"layer_types": ["linear_attention"] * 4}, "without any full_attention"),
        (CONFIGS["qwen3_5"], {"layer_types": ["sliding_attention"] * 4}, "each full_attention or linear_attention"),
        (CONFIGS["qwen3_next"], {"linear_num_value_heads": 3}, "a multiple of linear_num_key_heads=2"),
        (CONFIGS["granitemoehybrid"], {"mamba_n_heads": 6}, "mamba_n_heads=6 of mamba_d_head=10 dimensions"),
        (CONFIGS["granitemoehybrid"], {"mamba_n_groups": 3}, "a multiple of mamba_n_groups=3"),
        (CONFIGS["granitemoehybrid"], {"time_step_limit": [1.0, 0.5]}, "time_step_limit=[1.0, 0.5] has to be from 0"),
        (CONFIGS["granitemoehybrid"], {"time_step_limit": 3}, "time_step_limit=3 is not a least and a largest step"),
        (CONFIGS["granitemoehybrid"], {"layer_types": ["mamba"] * 3}, "without any full_attention"),
        (CONFIGS["granitemoehybrid"], {"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        (CONFIGS["granitemoehybrid"], {"hidden_act": "xielu"}, "learned"),
        (CONFIGS["nemotron_h"], {"num_hidden_layers": 4}, "num_hidden_layers=4, but 5 layers are listed"),
        (CONFIGS["nemotron_h"], {"layers_block_type": ["mlp"] * 5}, "one of them full_attention"),
        (CONFIGS["nemotron_h"], {"layers_block_type": ["attention", "conv"]}, "has to be of linear_attention"),
        (CONFIGS["nemotron_h"], {"moe_latent_size": 8}, "moe_latent_size=8"),
        (CONFIGS["nemotron_h"], {"time_step_limit": [0.0, 1.0]}, "time_step_limit=[0.0, 1.0] is not supported"),
        (CONFIGS["falcon_h1"], {"mamba_d_ssm": 42}, "have to make up 42"),
        (CONFIGS["falcon_h1"], {"ssm_multipliers": [1.0]}, "ssm_multipliers=[1.0] has to be 5 numbers"),
        (CONFIGS["falcon_h1"], {"mlp_multipliers": 2.0}, "mlp_multipliers=2.0 has to be 2 numbers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, change, named):
    with pytest.raises(UserError) as error:
        spec_from_config(config | change)
    assert named in str(error.value)


@pytest.mark.parametrize("name", ["vocab_size", "num_attention_heads", "hidden_size"])
def test_a_missing_size_is_named(name):
    with pytest.raises(UserError, match=f"lacks '{name}'"):
        spec_from_config({key: value for key, value in CONFIG.items() if key != name})
