"""What the small configs of family_configs.py are made of."""

SIZES = {
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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
MOE = {
    "head_dim": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}


def config(model_type: str, **fields) -> dict:
    return {"model_type": model_type} | SIZES | fields


DYNAMIC = {"type": "dynamic", "alpha": 20.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}
MINISTRAL3 = YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}
HALF = {"head_dim": 12, "partial_rotary_factor": 0.5}
# Of rope_parameters by kinds of layers.
BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA4 = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e3, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
QWEN2_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
ERNIE_MOE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 2}
PHIMOE_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 64,
}
# The first tokens of a document read next to nothing of the memory, and the norm after it divides by that: with a small
# epsilon gradients are of order 100, and what is 1e-4 of rounding would mean nothing.
LINEAR = {
    "rms_norm_eps": 0.1,
    "head_dim": 12,
    "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "rms_norm_eps": 0.1,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_expand": 2,
}
NEMOTRON_H = {
    "layer_norm_epsilon": 0.1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 5,
    "n_groups": 2,
    "ssm_state_size": 6,
}
# Of Falcon-H1.
FACTORS = {
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.8,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.6,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.9, 1.1, 1.3, 0.8, 0.7],
    "mlp_multipliers": [1.4, 0.6],
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
# DeepSeek's experts.
ROUTED = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 3, "topk_group": 2}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}
