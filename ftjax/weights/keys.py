"""Which Hugging Face tensor each parameter of ours is: the one table behind loading, writing and PEFT."""

import dataclasses

import numpy as np

from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec

FLOATS = ("float64", "float32", "float16", "bfloat16")  # what weights may be stored as


@dataclasses.dataclass(frozen=True)
class Key:
    """One parameter of ours as it is called, laid out and shaped in Hugging Face files.

    `template` has a `{}` for the layer number if ours is stacked over layers. `shape` is that of one Hugging
    Face tensor: [out, in] for a linear layer, which `transposed` says ours ([in, out]) is the transpose of.
    """

    template: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.template

    def names(self, layers: int) -> list[str]:
        """The Hugging Face names, one per layer if stacked, else one."""
        return [self.template.format(layer) for layer in range(layers)] if self.stacked else [self.template]

    def our_shape(self, layers: int) -> tuple[int, ...]:
        """The shape of our parameter: [L, in, out], [L, D], [V, D], ..."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (layers, *shape) if self.stacked else shape


def hf_names(spec: DecoderSpec) -> dict[str, Key]:
    """{path of a parameter: its Key}, "layers/mlp/up_proj/kernel" -> "model.layers.{}.mlp.up_proj.weight".

    Raises UserError for a family without a table here.
    """
    if spec.family not in _FAMILIES:
        raise UserError(
            f"no table of weights for model_type {spec.family!r}; there are: {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[spec.family](spec)


def _llama(spec: DecoderSpec) -> dict[str, Key]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    heads = spec.num_attention_heads * spec.head_dim
    kv_heads = spec.num_key_value_heads * spec.head_dim
    linear = {
        "self_attn/q_proj": (heads, hidden),
        "self_attn/k_proj": (kv_heads, hidden),
        "self_attn/v_proj": (kv_heads, hidden),
        "self_attn/o_proj": (hidden, heads),
        "mlp/gate_proj": (inner, hidden),
        "mlp/up_proj": (inner, hidden),
        "mlp/down_proj": (hidden, inner),
    }
    keys = {
        "embed_tokens/embedding": Key("model.embed_tokens.weight", (spec.vocab_size, hidden)),
        "norm/scale": Key("model.norm.weight", (hidden,)),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        keys[f"layers/{norm}/scale"] = Key(f"model.layers.{{}}.{norm}.weight", (hidden,))
    for module, shape in linear.items():
        name = f"model.layers.{{}}.{module.replace('/', '.')}.weight"
        keys[f"layers/{module}/kernel"] = Key(name, shape, transposed=True)
    if not spec.tie_word_embeddings:
        keys["lm_head/kernel"] = Key("lm_head.weight", (spec.vocab_size, hidden), transposed=True)
    return keys


_FAMILIES = {"llama": _llama}


def finite_cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` as `dtype`; UserError naming the tensor if one is NaN or infinite, before or by the cast."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype, copy=False)
    if np.isfinite(cast).all():
        return cast
    wrong = np.count_nonzero(~np.isfinite(values))
    if wrong:
        raise UserError(f"{name}: {wrong} of {values.size} values are NaN or infinite; get the weights again")
    raise UserError(f"{name}: holds values too large for {np.dtype(dtype).name}; choose bfloat16 or float32")
