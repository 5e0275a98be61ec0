"""GPT-2: learned positions, LayerNorm, biases everywhere, one kernel for queries, keys and values, no gate.

The dropout of its config (0.1) is not applied: fine-tuning here has none, as for every other family.
"""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import activation, flag, layer_count, positive, refuse, size
from ftjax.models.spec import DecoderSpec

# Its linear layers are stored as [in, out], as ours are.
_LINEAR = {
    "self_attn/qkv_proj": "attn.c_attn",
    "self_attn/o_proj": "attn.c_proj",
    "mlp/up_proj": "mlp.c_fc",
    "mlp/down_proj": "mlp.c_proj",
}
_NORMS = {"layers/input_layernorm": "h.{}.ln_1", "layers/post_attention_layernorm": "h.{}.ln_2", "norm": "ln_f"}
NAMES = {
    "embed_tokens/embedding": "transformer.wte.weight",
    "embed_positions/embedding": "transformer.wpe.weight",
    **{f"{ours}/{leaf}": f"transformer.{theirs}.{name}" for ours, theirs in _NORMS.items()
       for leaf, name in (("scale", "weight"), ("bias", "bias"))},
    **{f"layers/{ours}/{leaf}": f"transformer.h.{{}}.{theirs}.{name}" for ours, theirs in _LINEAR.items()
       for leaf, name in (("kernel", "weight"), ("bias", "bias"))},
}  # fmt: skip
AS_STORED = tuple(f"layers/{ours}/kernel" for ours in _LINEAR)
READ_AS = tuple((f"{name}.", f"transformer.{name}.") for name in ("wte", "wpe", "h", "ln_f"))  # GPT-2's own files
IGNORED = r"\.attn\.(masked_)?bias$"  # the causal mask, stored
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def gpt2(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, "add_cross_attention")
    config = {theirs: config[ours] for ours, theirs in _ALIASES.items() if ours in config} | config
    heads, hidden, layers = size(config, "n_head"), size(config, "n_embd"), layer_count(config, "n_layer")
    if hidden % heads:
        raise UserError(f"config.json: n_embd={hidden} is not a multiple of n_head={heads}")
    scale = (hidden // heads) ** -0.5 if flag(config, "scale_attn_weights", True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx")
    return DecoderSpec(
        family="gpt2",
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "n_inner", 4 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=size(config, "n_positions", 1024),
        norm_eps=positive(config, "layer_norm_epsilon", 1e-5),
        tie_word_embeddings=flag(config, "tie_word_embeddings", True),
        ropes=(),
        layer_ropes=(None,) * layers,
        layer_windows=(None,) * layers,
        attention_scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(layers)),
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        fused_qkv=True,
        hidden_act=activation(config, "activation_function", default="gelu_new"),
        mlp_bias=True,
        gate=None,
        norm="layer",
    )
