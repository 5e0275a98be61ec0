"""What a decoder is, without saying how it is computed: the description that every family's config reduces to."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Sizes and switches of one decoder; field names are those of Hugging Face `config.json` files.

    It is hashable, so it can be a static argument of `jax.jit` and a field of a Linen module.
    """

    family: str  # the `model_type` of the Hugging Face config, e.g. "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
