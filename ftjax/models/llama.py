"""Llama and the models that share its architecture to the letter (TinyLlama, SmolLM2)."""

from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec


def spec_from_config(config: dict) -> DecoderSpec:
    """Hugging Face Llama `config.json` -> DecoderSpec. Options that are not ported are refused by name."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope scaling": rope_type != "default" and f"rope_type={rope_type!r}",
        "attention biases": config.get("attention_bias") and "attention_bias=true",
        "mlp biases": config.get("mlp_bias") and "mlp_bias=true",
        "activation": config.get("hidden_act", "silu") != "silu" and f"hidden_act={config['hidden_act']!r}",
    }
    if problems := [f"{name} ({value})" for name, value in refused.items() if value]:
        raise UserError(f"this Llama config uses what is not supported yet: {', '.join(problems)}")
    heads = config["num_attention_heads"]
    return DecoderSpec(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
    )
