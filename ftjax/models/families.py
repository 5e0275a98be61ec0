"""From a Hugging Face `config.json` to the description of a decoder, by the config's own `model_type`."""

from ftjax.errors import UserError
from ftjax.models import llama
from ftjax.models.spec import DecoderSpec

FAMILIES = {"llama": llama.spec_from_config}


def spec_from_config(config: dict) -> DecoderSpec:
    """Raises UserError, listing what is there, for an architecture that is not, and for missing or odd sizes."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"no port of model_type {family!r}; there are: {', '.join(sorted(FAMILIES))}")
    try:
        spec = FAMILIES[family](config)
    except KeyError as error:
        raise UserError(f"config.json of a {family!r} model lacks {error}") from error
    sizes = {
        name: getattr(spec, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    } | {"num_attention_heads": spec.num_attention_heads, "num_key_value_heads": spec.num_key_value_heads}
    if wrong := {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}:
        raise UserError(f"config.json: not a positive whole number: {wrong}")
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise UserError(
            f"config.json: num_attention_heads={spec.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_key_value_heads}"
        )
    return spec
