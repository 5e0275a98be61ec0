"""What families with Mamba-2 have in common: its sizes, the limits of its steps, the older names of layers."""

import math
from collections.abc import Sequence
from typing import Any

from ftjax.errors import UserError
from ftjax.models.families.fields import attending, flag, number, shorten, size
from ftjax.models.spec import Mamba

_OLD = {"mamba": "linear_attention", "attention": "full_attention"}
_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def mamba(config: dict[str, Any], width: int, bias: bool, **others: Any) -> Mamba:
    """The mixer of `mamba_n_heads` heads and so on; width: of all heads together; others: what is not read here."""
    heads, groups = size(config, "mamba_n_heads", 128), size(config, "mamba_n_groups", 1)
    head_dim = width // heads if config.get("mamba_d_head", "auto") == "auto" else size(config, "mamba_d_head")
    taps = size(config, "mamba_d_conv", 4)
    if heads * head_dim != width or heads % groups or taps < 2:
        raise UserError(
            f"config.json: mamba_n_heads={heads} of mamba_d_head={head_dim} dimensions have to make up {width}, and be "
            f"a multiple of mamba_n_groups={groups}, and mamba_d_conv={taps} at least 2"
        )
    if config.get("hidden_act") == "xielu":
        raise UserError("config.json: hidden_act='xielu' has scalars that are learned, which Mamba-2 has not")
    return Mamba(
        heads=heads,
        head_dim=head_dim,
        state_dim=size(config, "mamba_d_state", 256),
        groups=groups,
        taps=taps,
        bias=bias,
        conv_bias=flag(config, "mamba_conv_bias", True),
        **others,
    )


def step_limits(config: dict[str, Any]) -> tuple[float, float]:
    """`time_step_limit`, of which no more than from 0 on is the default."""
    given = config.get("time_step_limit")
    limits = (0.0, math.inf) if given is None else given
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise UserError(f"config.json: time_step_limit={shorten(given)} is not a least and a largest step")
    # Infinity is written so where JSON alone is to do.
    low, high = (math.inf if one in (math.inf, {"__float__": "Infinity"}) else one for one in limits)
    low = number({"time_step_limit": low}, "time_step_limit", 0.0)
    high = high if high == math.inf else number({"time_step_limit": high}, "time_step_limit", 0.0)
    if not 0 <= low <= high:
        raise UserError(f"config.json: time_step_limit={shorten(given)} has to be from 0 on, and not fall")
    return low, high


def attending_layers(config: dict[str, Any], default: Sequence[bool]) -> list[bool]:
    """Which layers have attention, not Mamba-2, by `layer_types` where the config has it, in new names or old ones."""
    named = config.get("layer_types")
    if isinstance(named, list):
        config = config | {"layer_types": [_OLD.get(name, name) if isinstance(name, str) else name for name in named]}
    return attending(config, "linear_attention", default)


def listed_layers(config: dict[str, Any]) -> list[str]:
    """Of each layer which of _LETTERS it is: by a list, in new names or old ones, or by a text of letters."""
    given, known = config.get("layers_block_type"), _LETTERS | _OLD
    given = config.get("layer_types") if given is None else given
    given = config.get("hybrid_override_pattern", "ME*-") if given is None else given
    names = [known.get(str(name), str(name)) for name in given] if isinstance(given, str | list) else []
    if not set(names) <= set(_LETTERS.values()) or "full_attention" not in names:
        raise UserError(
            f"config.json: layers_block_type={shorten(given)} has to be of linear_attention, full_attention, mlp and "
            "moe, or M, *, - and E as hybrid_override_pattern, one of them full_attention"
        )
    if config.get("num_hidden_layers", len(names)) not in (None, len(names)):
        raise UserError(
            f"config.json: num_hidden_layers={shorten(config['num_hidden_layers'])}, but {len(names)} layers are listed"
        )
    return names
