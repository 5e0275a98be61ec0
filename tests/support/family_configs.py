"""Small Hugging Face configs, at least one per family, that together use every option the families have.

Odd head counts, head_dim unlike hidden_size / heads, windows shorter than the 18 tokens of a test row, positions beyond
the original RoPE range, tied and untied heads, biases.
"""

from ftjax.models.families import FAMILIES

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
_LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
_MOE = {
    "head_dim": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}


def _config(model_type: str, **fields) -> dict:
    return {"model_type": model_type} | _SIZES | fields


_DYNAMIC = {"type": "dynamic", "alpha": 20.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}
_MINISTRAL3 = _YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
_HALF = {"head_dim": 12, "partial_rotary_factor": 0.5}
# Of rope_parameters by kinds of layers.
_BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_GEMMA4 = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e3, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_QWEN2_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
_ERNIE_MOE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 2}
_PHIMOE_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 64,
}
# The first tokens of a document read next to nothing of the memory, and the norm after it divides by that: with a small
# epsilon gradients are of order 100, and what is 1e-4 of rounding would mean nothing.
_LINEAR = {
    "rms_norm_eps": 0.1,
    "head_dim": 12,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
# DeepSeek's experts.
_ROUTED = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}
_GROUPS = {"n_group": 3, "topk_group": 2}
_DEEPSEEK_YARN = _YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}

CONFIGS = {
    "llama": _config("llama", tie_word_embeddings=True),
    "apertus": _config("apertus", rope_parameters=_LLAMA3, attention_bias=True),
    "arcee": _config("arcee", rope_parameters=_YARN, mlp_bias=True),
    "cohere2": _config("cohere2", sliding_window=5, sliding_window_pattern=3, logit_scale=0.7),
    "deepseek_v2": _config(
        "deepseek_v2", rope_scaling=_DEEPSEEK_YARN, q_lora_rank=None, n_shared_experts=2, **_LATENT, **_ROUTED
    ),
    "deepseek_v3": _config("deepseek_v3", rope_scaling=_DEEPSEEK_YARN, q_lora_rank=8, **_LATENT, **_ROUTED, **_GROUPS),
    "ernie4_5": _config("ernie4_5", head_dim=12, use_bias=True),
    "ernie4_5_moe": _config("ernie4_5_moe", **_ERNIE_MOE),
    "exaone4": _config("exaone4", sliding_window=5, sliding_window_pattern=3),
    "glm": _config("glm", **_HALF),
    "glm4": _config("glm4", **_HALF),
    "glm4_moe": _config("glm4_moe", attention_bias=True, use_qk_norm=True, **_HALF, **_ROUTED, **_GROUPS),
    "glm4_moe_lite": _config("glm4_moe_lite", q_lora_rank=8, **_LATENT, **_ROUTED),
    "helium": _config("helium", head_dim=8, attention_bias=True, mlp_bias=True),
    "hunyuan_v1_dense": _config("hunyuan_v1_dense", head_dim=12, rope_scaling=_DYNAMIC, attention_bias=True),
    "hunyuan_v1_moe": _config(
        "hunyuan_v1_moe", head_dim=12, rope_scaling=_DYNAMIC, attention_bias=True, num_experts=5, moe_topk=2
    ),
    "lfm2": _config("lfm2", full_attn_idxs=[2, 4], num_hidden_layers=5, conv_bias=True, block_multiple_of=16),
    "ministral": _config(
        "ministral",
        head_dim=12,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "ministral3": _config("ministral3", head_dim=12, rope_parameters=_MINISTRAL3),
    "nemotron": _config("nemotron", attention_bias=True, mlp_bias=True, **_HALF),
    "olmo": _config("olmo", clip_qkv=0.5, attention_bias=True),
    "olmo3": _config("olmo3", num_hidden_layers=4, sliding_window=5, rope_scaling=_YARN),
    "phi": _config("phi", qk_layernorm=True, partial_rotary_factor=0.5),
    "qwen2_moe": _config("qwen2_moe", **_QWEN2_MOE),
    "seed_oss": _config("seed_oss", head_dim=12, attention_out_bias=True, mlp_bias=True),
    "stablelm": _config("stablelm", qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True),
    "starcoder2": _config("starcoder2", sliding_window=5),
    "gemma2": _config("gemma2", head_dim=10, sliding_window=5, query_pre_attn_scalar=20),
    "gemma3": _config(
        "gemma3_text",
        head_dim=12,
        num_hidden_layers=4,
        sliding_window=5,
        sliding_window_pattern=3,
        query_pre_attn_scalar=20,
        rope_theta=1e5,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3n": _config(
        "gemma3n_text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        intermediate_size=[48, 48, 48, 40],
        activation_sparsity_pattern=[0.6, 0.0, 0.0, 0.6],
        head_dim=8,
        num_kv_shared_layers=2,
        sliding_window=5,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=50,
        altup_num_inputs=3,
        laurel_rank=5,
        rope_parameters=_BY_KIND,
    ),
    "gemma4": _config(
        "gemma4_text",
        num_hidden_layers=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        head_dim=8,
        global_head_dim=12,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        sliding_window=5,
        hidden_size_per_layer_input=40,
        vocab_size_per_layer_input=61,
        rope_parameters=_GEMMA4,
    ),
    "gemma4, experts, double wide": _config(
        "gemma4_text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=8,
        global_head_dim=12,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        sliding_window=4,
        hidden_size_per_layer_input=40,
        vocab_size_per_layer_input=61,
        enable_moe_block=True,
        num_experts=5,
        top_k_experts=2,
        moe_intermediate_size=20,
    ),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 36,
        "n_layer": 3,
        "n_head": 9,
        "n_positions": 64,
        "scale_attn_by_inverse_layer_idx": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt_oss": _config(
        "gpt_oss", head_dim=8, num_local_experts=5, num_experts_per_tok=2, sliding_window=5, swiglu_limit=1.5
    ),
    "granite": _config(
        "granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.5,
        logits_scaling=0.8,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "granitemoe": _config(
        "granitemoe",
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.5,
        logits_scaling=0.8,
        num_local_experts=5,
        tie_word_embeddings=True,
    ),
    "llama 3.1, biases, odd heads": _config(
        "llama",
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=10,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_LLAMA3,
    ),
    "llama4": _config(
        "llama4_text",
        head_dim=12,
        num_hidden_layers=4,
        intermediate_size_mlp=40,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=5,
        floor_scale=4,
        attn_scale=0.5,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "minimax_m2": _config("minimax_m2", head_dim=12, rotary_dim=6, num_local_experts=5, num_experts_per_tok=2),
    "mistral": _config("mistral", head_dim=12, sliding_window=5),
    "mixtral": _config("mixtral", num_local_experts=4, sliding_window=6, head_dim=10, tie_word_embeddings=True),
    "olmo2": _config("olmo2", attention_bias=True),
    "phi3": _config(
        "phi3",
        sliding_window=7,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=8,
        rope_scaling=_LONGROPE,
    ),
    "phimoe": _config("phimoe", rope_scaling=_PHIMOE_ROPE, attention_bias=True, lm_head_bias=True, num_local_experts=5),
    "qwen2": _config("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": _config("qwen3", head_dim=12, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": _config("qwen3_moe", **_MOE),
    "qwen3_moe, a dense layer first": _config("qwen3_moe", mlp_only_layers=[0], **_MOE),
    "qwen3_moe, every second layer": _config("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4, **_MOE),
    "qwen3_5": _config("qwen3_5_text", num_hidden_layers=4, **_LINEAR),
    "qwen3_5_moe": _config("qwen3_5_moe_text", num_hidden_layers=4, full_attention_interval=2, **_LINEAR, **_QWEN2_MOE),
    "qwen3_next": _config("qwen3_next", num_hidden_layers=4, **_LINEAR, **_QWEN2_MOE),
    "smollm3": _config("smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5, mlp_bias=True),
}

# The same families with their options the other way round.
MORE_CONFIGS = {
    "apertus, plain, tied": _config(
        "apertus",
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
    ),
    "arcee, tied": _config("arcee", tie_word_embeddings=True, head_dim=12),
    "cohere2, layer types, untied, bias": _config(
        "cohere2",
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        logit_scale=1.2,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "deepseek_v2, groups, biases, tied": _config(
        "deepseek_v2",
        q_lora_rank=8,
        topk_method="group_limited_greedy",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=0.01,
        **_LATENT | {"v_head_dim": 12},
        **_ROUTED | {"first_k_dense_replace": 0},
        **_GROUPS,
    ),
    "deepseek_v3, halves, biases, not normalized": _config(
        "deepseek_v3",
        q_lora_rank=None,
        attention_bias=True,
        rope_interleave=False,
        norm_topk_prob=False,
        rms_norm_eps=0.01,
        n_group=1,
        topk_group=1,
        tie_word_embeddings=True,
        **_LATENT | {"v_head_dim": 12},
        **_ROUTED | {"first_k_dense_replace": 2},
    ),
    "ernie4_5, untied": _config("ernie4_5", head_dim=8, tie_word_embeddings=False),
    "ernie4_5_moe, layers, bias": _config(
        "ernie4_5_moe",
        use_bias=True,
        moe_num_shared_experts=0,
        num_hidden_layers=5,
        moe_layer_start_index=2,
        moe_layer_end_index=3,
        moe_layer_interval=2,
        tie_word_embeddings=False,
        **{name: value for name, value in _ERNIE_MOE.items() if name != "moe_num_shared_experts"},
    ),
    "exaone4, no windows, tied": _config(
        "exaone4", sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True
    ),
    "glm, whole heads, tied": _config(
        "glm", head_dim=8, partial_rotary_factor=1.0, attention_bias=False, tie_word_embeddings=True
    ),
    "glm4, no bias": _config("glm4", head_dim=8, attention_bias=False),
    "glm4_moe, all layers, tied": _config(
        "glm4_moe", **_ROUTED | {"first_k_dense_replace": 0, "norm_topk_prob": False}, tie_word_embeddings=True
    ),
    "glm4_moe_lite, layer types, tied": _config(
        "glm4_moe_lite",
        q_lora_rank=None,
        mlp_layer_types=["sparse", "dense", "sparse"],
        rope_interleave=False,
        tie_word_embeddings=True,
        **_LATENT,
        **_ROUTED,
        **_GROUPS,
    ),
    "helium, tied": _config("helium", head_dim=8, tie_word_embeddings=True),
    "hunyuan_v1_dense, tied": _config("hunyuan_v1_dense", head_dim=8, tie_word_embeddings=True),
    "hunyuan_v1_moe, tied": _config(
        "hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=[3, 3, 3], tie_word_embeddings=True
    ),
    "lfm2, layer types, untied": _config(
        "lfm2",
        layer_types=["conv", "conv", "full_attention"],
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
    ),
    "ministral, windows": _config("ministral", head_dim=8, sliding_window=4, tie_word_embeddings=True),
    "ministral3, window": _config(
        "ministral3", head_dim=8, sliding_window=6, rope_parameters=_MINISTRAL3, tie_word_embeddings=True
    ),
    "nemotron, relu, tied": _config("nemotron", hidden_act="relu", partial_rotary_factor=1.0, tie_word_embeddings=True),
    "olmo, no clip, tied": _config("olmo", tie_word_embeddings=True),
    "olmo3, ropes, layer types": _config(
        "olmo3",
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=_BY_KIND,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "phi, no norms": _config("phi", partial_rotary_factor=1.0, num_key_value_heads=4, hidden_act="gelu"),
    "qwen2_moe, dense layers, window": _config(
        "qwen2_moe",
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        qkv_bias=False,
        tie_word_embeddings=True,
        **_QWEN2_MOE,
    ),
    "seed_oss, no bias, tied": _config("seed_oss", head_dim=8, attention_bias=False, tie_word_embeddings=True),
    "stablelm, plain, tied": _config("stablelm", tie_word_embeddings=True, partial_rotary_factor=0.5),
    "starcoder2, untied, no bias": _config("starcoder2", use_bias=False, tie_word_embeddings=False, hidden_act="gelu"),
    "llama, untied, head_dim": _config("llama", hidden_size=24, head_dim=10),
    "llama, one kv head, other eps": _config("llama", num_key_value_heads=1, rms_norm_eps=0.1, rope_theta=100.0),
    "llama, as many kv heads": _config("llama", num_key_value_heads=4),
    "llama, linear": _config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama, yarn": _config("llama", rope_parameters=_YARN),
    "gemma2, no caps, bias, untied": _config(
        "gemma2",
        head_dim=8,
        sliding_window=40,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma3, cap, bias, layer types": _config(
        "gemma3_text",
        head_dim=8,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=3.0,
        attention_bias=True,
        hidden_activation="gelu",
    ),
    "gemma3n, other stream, nothing shared": _config(
        "gemma3n_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=8,
        num_kv_shared_layers=0,
        sliding_window=4,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=61,
        altup_num_inputs=2,
        altup_active_idx=1,
        laurel_rank=5,
        attention_bias=True,
        final_logit_softcapping=3.0,
    ),
    "gemma4, keys are values, cap, bias": _config(
        "gemma4_text",
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=4,
        hidden_size_per_layer_input=0,
        final_logit_softcapping=3.0,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    # The lender of keys and values is in the second round of a period.
    "gemma4, shared keys of a period": _config(
        "gemma4_text",
        num_hidden_layers=5,
        layer_types=[*["sliding_attention", "full_attention"] * 2, "full_attention"],
        head_dim=8,
        global_head_dim=12,
        num_kv_shared_layers=1,
        sliding_window=4,
        hidden_size_per_layer_input=40,
        vocab_size_per_layer_input=61,
    ),
    "gpt2, plain, relu": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 64,
        "activation_function": "relu",
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt_oss, one expert, tied": _config(
        "gpt_oss",
        head_dim=12,
        num_local_experts=3,
        num_experts_per_tok=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=4,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters=_YARN | {"truncate": True, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    ),
    "gemma3, windows in all layers": _config(
        "gemma3_text", head_dim=8, num_hidden_layers=2, sliding_window=5, rope_theta=1e5, rope_local_base_freq=100.0
    ),
    "granite, plain": _config("granite"),
    "granitemoe, bias, one expert": _config(
        "granitemoe", num_local_experts=3, num_experts_per_tok=1, attention_bias=True
    ),
    "llama4, no norm, all mixtures": _config(
        "llama4_text",
        head_dim=8,
        num_hidden_layers=4,
        use_qk_norm=False,
        rope_parameters=_LLAMA3,
        no_rope_layers=[1, 0, 1, 1],
        attention_chunk_size=7,
        attn_temperature_tuning=False,
        num_local_experts=3,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "llama4, dense layers first": _config(
        "llama4_text",
        head_dim=8,
        intermediate_size_mlp=40,
        moe_layers=[2],
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        attention_chunk_size=4,
        floor_scale=8,
        num_local_experts=4,
    ),
    "minimax_m2, whole heads, tied": _config(
        "minimax_m2", head_dim=8, num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True
    ),
    "mistral, no window": _config("mistral", sliding_window=None, tie_word_embeddings=True),
    "mixtral, one expert": _config("mixtral", num_local_experts=3, num_experts_per_tok=1, head_dim=8),
    "olmo2, grouped, tied": _config("olmo2", num_key_value_heads=1, tie_word_embeddings=True),
    "phi3, plain": _config("phi3", tie_word_embeddings=True, num_key_value_heads=4),
    "phimoe, window, tied": _config(
        "phimoe", sliding_window=5, router_jitter_noise=0.2, num_local_experts=4, tie_word_embeddings=True
    ),
    "qwen2, no window, tied": _config("qwen2", tie_word_embeddings=True),
    "qwen3, window": _config("qwen3", head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3_moe, not normalized, window": _config(
        "qwen3_moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
    ),
    # Runs, and a period that is one group of several.
    "qwen3_moe, dense layers here and there": _config(
        "qwen3_moe",
        num_hidden_layers=9,
        mlp_only_layers=[1, 2, 5, 7],
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=True,
        **_MOE,
    ),
    "qwen3_5, runs, bias, tied": _config(
        "qwen3_5_text",
        num_hidden_layers=5,
        layer_types=["full_attention", *["linear_attention"] * 3, "full_attention"],
        attention_bias=True,
        tie_word_embeddings=True,
        **_LINEAR | {"linear_num_key_heads": 4, "linear_conv_kernel_dim": 3},
    ),
    "qwen3_next, dense layers, biases, tied": _config(
        "qwen3_next",
        num_hidden_layers=5,
        layer_types=["full_attention", *["linear_attention"] * 3, "full_attention"],
        mlp_only_layers=[1, 4],
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=True,
        **_LINEAR | {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 2},
        **_QWEN2_MOE,
    ),
    "smollm3, no positions at all": _config("smollm3", no_rope_layers=[0, 0, 0]),
    "smollm3, untied, bias": _config(
        "smollm3", attention_bias=True, tie_word_embeddings=False, no_rope_layers=[1, 1, 0]
    ),
}

# All but those that have one of the others inside.
LANGUAGE_MODELS = {name for name, family in FAMILIES.items() if not family.language_models}
assert {config["model_type"] for config in CONFIGS.values()} == LANGUAGE_MODELS
