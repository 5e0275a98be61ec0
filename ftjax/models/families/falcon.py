"""Falcon-H1: attention and Mamba-2 side by side in every layer, and factors before and after all of a layer's parts."""

from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import decoder_fields, flag, number, shorten, size
from ftjax.models.families.mamba_shared import mamba, step_limits
from ftjax.models.spec import DecoderSpec, Multipliers

NAMES = {
    "norm/scale": "model.final_layernorm.weight",
    "layers/post_attention_layernorm/scale": "model.layers.{}.pre_ff_layernorm.weight",
    **{
        f"layers/mlp/{name}/{ours}": f"model.layers.{{}}.feed_forward.{name}.{theirs}"
        for name in ("gate_proj", "up_proj", "down_proj")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}


def falcon_h1(config: dict[str, Any]) -> DecoderSpec:
    config = {"num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5} | config
    fields = decoder_fields(config)
    scale = fields["head_dim"] ** -0.5 * number(config, "key_multiplier", 1.0)
    expanded = size(config, "mamba_expand", 2) * fields["hidden_size"]  # which counts where the width is left to it
    width = expanded if config.get("mamba_d_ssm", 1024) is None else size(config, "mamba_d_ssm", 1024)
    norm = "first" if flag(config, "mamba_norm_before_gate", True) else "gated"
    its = mamba(
        config,
        width,
        flag(config, "mamba_proj_bias"),
        out_bias=flag(config, "projectors_bias"),
        limits=step_limits(config),
        norm=norm if flag(config, "mamba_rms_norm") else None,
        beside=True,
    )
    gate, down = _factors(config, "mlp_multipliers", 2)
    multipliers = Multipliers(
        attention_in=number(config, "attention_in_multiplier", 1.0),
        attention_out=number(config, "attention_out_multiplier", 1.0),
        mamba_in=number(config, "ssm_in_multiplier", 1.0),
        mamba_out=number(config, "ssm_out_multiplier", 1.0),
        mamba=_factors(config, "ssm_multipliers", 5),
        gate=gate,
        down=down,
    )
    return DecoderSpec(
        **fields | {"attention_scales": (scale,) * fields["num_hidden_layers"]},
        mamba=its,
        mlp_bias=flag(config, "mlp_bias"),
        multipliers=multipliers,
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        logit_scale=number(config, "lm_head_multiplier", 1.0),
    )


def _factors(config: dict[str, Any], name: str, count: int) -> tuple[float, ...]:
    given = config.get(name)
    given = [1.0] * count if given is None else given
    if not isinstance(given, list | tuple) or len(given) != count:
        raise UserError(f"config.json: {name}={shorten(given)} has to be {count} numbers")
    return tuple(number({name: factor}, name, 1.0) for factor in given)
