"""Reading a Hugging Face `config.json`: typed fields, and those that every family shares under Llama's names."""

from collections.abc import Sequence
from typing import Any

from ftjax.errors import UserError
from ftjax.models.layers import ACTIVATIONS
from ftjax.models.rope import make_rope, rope_parameters, yarn_magnitude
from ftjax.models.spec import Latent, Rope

# Or a corrupt config would make lists as long as it pleases.
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 65_536


def size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number; `default` where the config lacks it or says null."""
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise UserError(f"config.json of a {config['model_type']!r} model lacks {name!r}")
    if type(value) is not int or not 1 <= value < 2**31:  # what an int32 position can reach
        raise UserError(f"config.json: {name}={shorten(value)} is not a positive whole number below 2^31")
    return value


def number(config: dict[str, Any], name: str, default: float) -> float:
    value = default if config.get(name) is None else config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise UserError(f"config.json: {name}={shorten(value)} is not a number")
    return float(value)


def positive(config: dict[str, Any], name: str, default: float) -> float:
    value = number(config, name, default)
    if value <= 0:
        raise UserError(f"config.json: {name}={value!r} is not positive")
    return value


def shorten(value: Any) -> str:
    """Its repr, at most 80 characters of it: what a stranger wrote may be long."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def optional(config: dict[str, Any], name: str, default: float | None = None) -> float | None:
    """A number, or None where the config says null; `default` where it says nothing."""
    value = config.get(name, default)
    return None if value is None else number({name: value}, name, 0.0)


def flag(config: dict[str, Any], name: str, default: bool = False) -> bool:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, bool):
        raise UserError(f"config.json: {name}={value!r} is not true or false")
    return value


def activation(config: dict[str, Any], *names: str, default: str = "silu") -> str:
    """The activation under the first of `names` that the config has."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UserError(
            f"config.json: {names[0]}={shorten(value)} is not supported; there are: {', '.join(ACTIVATIONS)}"
        )
    return value


def token_id(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if type(value) is not int or not 0 <= value < 2**31:
        raise UserError(f"config.json: {name}={shorten(value)} is not the id of a token")
    return value


def object_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """One that is nested in the config."""
    value = config.get(name)
    if not isinstance(value, dict):
        raise UserError(f"config.json of a {config['model_type']!r} model lacks {name!r}")
    return value


def refuse(config: dict[str, Any], name: str, harmless: Any = False) -> None:
    """UserError where an option that is not ported is set to anything but null or `harmless`."""
    if config.get(name) is not None and config[name] != harmless:
        raise UserError(
            f"config.json: {name}={shorten(config[name])} of a {config['model_type']!r} model is not supported, "
            f"only {harmless!r} is"
        )


def layer_count(config: dict[str, Any], name: str = "num_hidden_layers") -> int:
    layers = size(config, name)
    if layers > MAX_LAYERS:
        raise UserError(f"config.json: {name}={layers} is more than {MAX_LAYERS}; get the config again")
    return layers


def rope(
    config: dict[str, Any], head_dim: int, positions: int, default_theta: float = 10_000.0, partial: bool = False
) -> Rope:
    """What the config says of RoPE. partial: whether this family turns a part of a head where the config says so."""
    parameters = rope_parameters(config, default_theta)
    if parameters["partial_rotary_factor"] != 1 and not partial:
        refuse(config | parameters, "partial_rotary_factor", harmless=1)
    return make_rope(parameters, head_dim, positions)


def decoder_fields(
    config: dict[str, Any], default_theta: float = 10_000.0, partial_rotary: bool = False
) -> dict[str, Any]:
    """Arguments of DecoderSpec for a model whose config has Llama's field names; the families change what differs.

    default_theta: RoPE's base where the config has none; partial_rotary: see `rope`.
    """
    heads, layers = size(config, "num_attention_heads"), layer_count(config)
    head_dim = size(config, "head_dim", max(1, size(config, "hidden_size") // heads))
    if head_dim > MAX_HEAD_DIM or head_dim % 2:
        raise UserError(f"config.json: heads of {head_dim} dimensions, not of an even number up to {MAX_HEAD_DIM}")
    positions = size(config, "max_position_embeddings", 2048)
    return {
        "family": config["model_type"],
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": size(config, "hidden_size"),
        "intermediate_size": size(config, "intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "norm_eps": positive(config, "rms_norm_eps", 1e-6),
        "tie_word_embeddings": flag(config, "tie_word_embeddings"),
        "ropes": (rope(config, head_dim, positions, default_theta, partial_rotary),),
        "layer_ropes": (0,) * layers,
        "layer_windows": (None,) * layers,
        "attention_scales": (head_dim**-0.5,) * layers,
        "hidden_act": activation(config, "hidden_act"),
        "qkv_bias": flag(config, "attention_bias"),
        "o_bias": flag(config, "attention_bias"),
    }


def latent_fields(config: dict[str, Any]) -> dict[str, Any]:
    """As `decoder_fields`, of latent attention; what RoPE knows as a head is the part of one that it turns."""
    turned, value_dim = size(config, "qk_rope_head_dim", 64), size(config, "v_head_dim", 128)
    given = config | {"head_dim": turned, "num_key_value_heads": None}  # as many as of queries, whatever it says
    fields, head_dim = decoder_fields(given), turned + size(config, "qk_nope_head_dim", 128)
    q_rank = None if config.get("q_lora_rank") is None else size(config, "q_lora_rank")
    scale, rope = head_dim**-0.5, rope_parameters(config)
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_magnitude(positive(rope, "factor", 1.0), number(rope, "mscale_all_dim", 0.0)) ** 2
    return fields | {
        "head_dim": head_dim,
        "latent": Latent(size(config, "kv_lora_rank", 512), turned, value_dim, q_rank),
        "attention_scales": (scale,) * fields["num_hidden_layers"],
        "rope_interleaved": flag(config, "rope_interleave", True),
    }


def dense_first(config: dict[str, Any], fields: dict[str, Any]) -> list[bool]:
    """Which layers have no experts: the first `first_k_dense_replace`."""
    refuse(config, "moe_layer_freq", harmless=1)
    count = config.get("first_k_dense_replace") or 0
    if type(count) is not int or count < 0:
        raise UserError(f"config.json: first_k_dense_replace={shorten(count)} is not a number of layers")
    return [layer < count for layer in range(fields["num_hidden_layers"])]


def layer_types(config: dict[str, Any], default: Sequence[bool], kind: str = "sliding_attention") -> list[bool]:
    """Which layers have a sliding window, or are of another `kind`, from `layer_types` where the config has it."""
    return _are(config, kind, "full_attention", default)


def attending(config: dict[str, Any], other: str, default: Sequence[bool]) -> list[bool]:
    """Which layers have attention and are not what `layer_types`, where the config has it, calls `other`."""
    found = _are(config, "full_attention", other, default)
    if not any(found):
        raise UserError("config.json: layer_types without any full_attention are not supported; one layer has to be")
    return found


def _are(config: dict[str, Any], kind: str, other: str, default: Sequence[bool]) -> list[bool]:
    named, kinds = config.get("layer_types"), {kind: True, other: False}
    if named is None:
        return list(default)
    if not isinstance(named, list) or len(named) != len(default) or not all(str(kind) in kinds for kind in named):
        raise UserError(
            f"config.json: layer_types has to name {len(default)} layers, each {' or '.join(kinds)}; "
            f"it is {shorten(named)}"
        )
    return [kinds[kind] for kind in named]


def mistral_fields(config: dict[str, Any], **options) -> dict[str, Any]:
    """As `decoder_fields`, but no biases in attention, and a window in every layer where the config has one."""
    fields = decoder_fields(config, **options)
    sliding = [config.get("sliding_window") is not None] * fields["num_hidden_layers"]
    return fields | {"qkv_bias": False, "o_bias": False, "layer_windows": windows(config, sliding)}


def windows(config: dict[str, Any], sliding: Sequence[bool]) -> tuple[int | None, ...]:
    """`sliding_window` for the layers that slide, None for the others."""
    return tuple(size(config, "sliding_window") if slides else None for slides in sliding)
