"""GGUF files (llama.cpp's): tensors dequantised to float32 under Hugging Face names, and the config they imply."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from ftjax.errors import UserError
from ftjax.weights.gguf_header import Tensor, parse

# GGUF's names of a Llama's tensors -> Hugging Face's.
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFReader:
    """One GGUF file of a Llama. Raises UserError when it is malformed or holds what is not supported.

    `metadata` holds every key of the file (tokens and merges as lists of str, chat template included);
    `config` is the Hugging Face config made from it. `shape`, `dtype` and `read` raise KeyError for a name
    that is not in `names()`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, tensors = parse(path)
        architecture = self.metadata.get("general.architecture")
        if architecture not in _CONFIGS:
            raise UserError(
                f"{path}: no support for GGUF files of architecture {architecture!r}; there are: "
                f"{', '.join(_CONFIGS)}. The safetensors of the model may be supported"
            )
        self.config = _CONFIGS[architecture](path, self.metadata, tensors)
        self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}

    def names(self) -> set[str]:
        """Hugging Face names; a tensor that has none there keeps GGUF's."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        assert name in self._tensors
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """float32, the part that `index` selects; only the rows it names are dequantised."""
        shape, kind, raw = self._tensors[name]
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        if name.endswith(("self_attn.q_proj.weight", "self_attn.k_proj.weight")):
            heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            raw = raw[_half_split(shape[0], heads)[index[0]]]
        else:
            raw = raw[index[:-1]]
        return dequantize(raw, kind)[..., index[-1]]


def _half_split(rows: int, heads: int) -> np.ndarray:
    """int[rows]: which GGUF row is each Hugging Face row of a q or k projection.

    Inside a head GGUF interleaves the two halves that a rotation pairs (0, n/2, 1, n/2 + 1, ...); Hugging
    Face has one half after the other. No value changes, so rows may be reordered before they are dequantised.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _hf_name(name: str) -> str:
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, module = found.groups()
        return f"model.layers.{layer}.{_INNER[module]}.weight" if module in _INNER else name
    module = name.removesuffix(".weight")
    return f"{_OUTER[module]}.weight" if module in _OUTER else name


def _llama_config(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    def get(key: str, default: int | float | None = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{path}: llama.{key} is {value!r}, not a number; the file lacks what a config needs"
            )
        return value

    scaling = metadata.get("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors or scaling != "none":
        raise UserError(
            f"{path}: scaled RoPE (Llama 3.1 and later) in a GGUF is not supported; use its safetensors"
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: no token_embd.weight, so not the (first) file of a model")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // max(heads, 1)))
    if (
        get("rope.dimension_count", head_dim) != head_dim
        or get("attention.value_length", head_dim) != head_dim
    ):
        raise UserError(f"{path}: heads of different sizes, or RoPE on a part of a head, are not supported")
    kv_heads = get("attention.head_count_kv", heads)
    for projection, count in (("attn_q", heads), ("attn_k", kv_heads)):
        shape = (
            tensors[f"blk.0.{projection}.weight"].shape if f"blk.0.{projection}.weight" in tensors else (0,)
        )
        if count < 1 or shape[0] != count * head_dim or head_dim % 2:
            raise UserError(f"{path}: {projection} has {shape[0]} rows, not {count} heads of size {head_dim}")
    ids = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "eot", "eom", "padding")
    }
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": get("context_length"),
        # Stored as float32: its shortest decimal is what the original config says (1e-05, not
        # 9.999999747378752e-06).
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_parameters": {"rope_theta": float(get("rope.freq_base", 10_000.0)), "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": ids["padding"],
        "dtype": "float32",
    }


_CONFIGS = {"llama": _llama_config}
