"""The Hugging Face config that a GGUF file's metadata imply, and the metadata of a config: one pair per architecture.

The config has to describe what llama.cpp computes from a file, so llama.cpp's fixed choices are written out here (the
scale of Gemma's attention, the period of its windows, Qwen3's router). A model with settings that an architecture has
no key for is never written: `gguf.write` compares the decoder that a file describes with the one to be written.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ftjax.errors import UserError
from ftjax.models.families import FAMILIES
from ftjax.models.rope import rope_parameters
from ftjax.models.spec import DecoderSpec
from ftjax.weights.gguf.header import Fields, Tensor, shorten
from ftjax.weights.gguf.rope import longrope_metadata, read_longrope, read_rope, rope_metadata

_LOCAL_THETA, _GEMMA3_PERIOD = 10_000.0, 6  # Gemma 3's, for files without the keys
_DEFAULT_THETA = {
    "gemma3_text": 1e6,
    "mixtral": 1e6,
    "smollm3": 2e6,
}  # for Hugging Face configs without one; else 10,000
_OTHER_YARN = (
    "llama.cpp would compute another model, as it rounds the ends of YaRN's ramp, which moves GPT-OSS's frequencies by "
    "up to 76 %"
)
# Layers of the 27B Gemmas, by which llama.cpp knows that their attention is scaled by the width of the model.
_LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}


def hf_config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json that the header of a GGUF file implies.

    Raises UserError for an architecture that is not supported, by name with the list, and for missing, mistyped or
    contradictory metadata.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: no support for GGUF files of architecture {shorten(architecture)}; there are: "
            f"{', '.join(ARCHITECTURES)}. The safetensors of the model may be supported"
        )
    file = Fields(path, metadata, tensors)
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(f"{path}: no token_embd.weight, so not the (first) file of a model")
    vocab = tensors["token_embd.weight"].shape[0]
    if file.whole("block_count") > len(tensors):
        raise file.error(f"{architecture}.block_count is {file.whole('block_count')}, of only {len(tensors)} tensors")
    config = ARCHITECTURES[architecture].read(file)
    return config | _token_ids(file, vocab) | {
        "architectures": [FAMILIES[config["model_type"]].architecture],
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }  # fmt: skip


def _token_ids(file: Fields, vocab: int) -> dict[str, Any]:
    ids = {
        name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")
    }
    several = file.metadata.get("tokenizer.ggml.eos_token_ids", [])
    if not isinstance(several, list):
        raise file.error(f"tokenizer.ggml.eos_token_ids is {shorten(several)}, not a list of token ids")
    named = [(f"{name}_token_id", value) for name, value in ids.items() if value is not None]
    for name, value in [*named, *(("eos_token_ids", value) for value in several)]:
        if type(value) is not int or not 0 <= value < vocab:
            raise file.error(f"tokenizer.ggml.{name} is {shorten(value)}, the embedding has {vocab} rows")
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = list(dict.fromkeys([*ends, *several]))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": ids["padding"],
    }


def _decoder(file: Fields) -> dict[str, Any]:
    """The settings common to every architecture but GPT-2, under Llama's names, without RoPE."""
    heads, width = file.whole("attention.head_count"), file.whole("embedding_length")
    head_dim = file.whole("attention.key_length", file.whole("rope.dimension_count", width // heads or 1))
    if file.whole("attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise file.error(f"heads of different or odd sizes ({head_dim}) are not supported")
    return {
        "hidden_size": width,
        "intermediate_size": file.whole("feed_forward_length"),
        "num_hidden_layers": file.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": file.whole("context_length"),
        "rms_norm_eps": file.real("attention.layer_norm_rms_epsilon"),
    }


def _llama(file: Fields) -> dict[str, Any]:
    """Llama, and Mistral and Mixtral, whose files have the same architecture."""
    config = _with_biases(file) | {"model_type": "llama"}
    if (window := file.window("attention.sliding_window")) is not None:
        config |= {"model_type": "mistral", "sliding_window": window}
    if file.has("expert_count"):
        config |= {
            "model_type": "mixtral",
            "sliding_window": config.get("sliding_window"),
            "num_local_experts": file.whole("expert_count"),
            "num_experts_per_tok": file.whole("expert_used_count"),
        }
    if config["model_type"] != "llama" and (config["attention_bias"] or config["mlp_bias"]):
        raise file.error("a sliding window or experts together with biases are not supported")
    return config


def _with_biases(file: Fields) -> dict[str, Any]:
    config = _decoder(file)
    return config | {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "rope_parameters": read_rope(file, config["head_dim"]),
    }


def _granite(file: Fields) -> dict[str, Any]:
    config = _with_biases(file)
    return config | {
        "model_type": "granite",
        "attention_multiplier": file.real("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": file.real("embedding_scale", 1.0),
        "residual_multiplier": file.real("residual_scale", 1.0),
        "logits_scaling": file.real("logit_scale", 1.0),
    }


def _smollm3(file: Fields) -> dict[str, Any]:
    config = _decoder(file)
    return config | {
        "model_type": "smollm3",
        "rope_parameters": read_rope(file, config["head_dim"]),
        "no_rope_layer_interval": 4,  # not in the files: llama.cpp leaves positions out of every fourth layer
        "use_sliding_window": False,
    }


def _qwen(file: Fields) -> dict[str, Any]:
    """Qwen 2 and 3, whose `model_type` has the name of the architecture."""
    config = _decoder(file)
    file.refuse("attention.sliding_window")
    return config | {"model_type": file.architecture, "rope_parameters": read_rope(file, config["head_dim"])}


def _of_experts(file: Fields) -> Fields:
    """A file in which `feed_forward_length`, where it has none, is that of its experts."""
    width = file.whole("expert_feed_forward_length")
    key = f"{file.architecture}.feed_forward_length"
    return Fields(file.path, {key: width} | dict(file.metadata), file.tensors)


def _qwen3_moe(file: Fields) -> dict[str, Any]:
    return _qwen(_of_experts(file)) | {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": file.whole("expert_feed_forward_length"),
        "num_experts": file.whole("expert_count"),
        "num_experts_per_tok": file.whole("expert_used_count"),
        "norm_topk_prob": True,  # not in the files: llama.cpp always normalizes
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gpt_oss(file: Fields) -> dict[str, Any]:
    file.refuse("rope.freq_base_swa", "expert_weights_scale")
    config = _decoder(_of_experts(file))
    rope = read_rope(file, config["head_dim"])
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # as OpenAI's code and Hugging Face's config have it; llama.cpp rounds the ramp's ends
    window, period = file.whole("attention.sliding_window"), file.whole("attention.sliding_window_pattern", 2)
    return config | {
        "model_type": "gpt_oss",
        "intermediate_size": file.whole("expert_feed_forward_length"),
        "attention_bias": True,
        "rope_parameters": rope,
        "sliding_window": window,
        "layer_types": _layer_types(config["num_hidden_layers"], period),
        "num_local_experts": file.whole("expert_count"),
        "num_experts_per_tok": file.whole("expert_used_count"),
        "swiglu_limit": 7.0,  # not in the files, as the alpha of 1.702
    }


def _layer_types(layers: int, period: int | None) -> list[str]:
    """Every so many-th layer sees all tokens; all do if `period` is None."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[period is not None and (layer + 1) % period != 0] for layer in range(min(layers, 10_000))]


def _gemma(file: Fields) -> dict[str, Any]:
    config = _decoder(file)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    large = layers == _LARGE_GEMMA[file.architecture]
    del config["hidden_act"]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if large else head_dim,
        "final_logit_softcapping": file.optional("final_logit_softcapping"),
        "attn_logit_softcapping": file.optional("attn_logit_softcapping"),
    }
    rope = read_rope(file, head_dim)
    if file.architecture == "gemma2":
        window, period = file.whole("attention.sliding_window"), 2
        config |= {"model_type": "gemma2", "sliding_window": window, "rope_parameters": rope}
    else:
        local = {"rope_type": "default", "rope_theta": file.real("rope.freq_base_swa", _LOCAL_THETA)}
        period = file.whole("attention.sliding_window_pattern", _GEMMA3_PERIOD)
        ropes = {"full_attention": rope, "sliding_attention": local}
        config |= {"model_type": "gemma3_text", "rope_parameters": ropes}
        config["sliding_window"] = window = file.window("attention.sliding_window")
    return config | {"layer_types": _layer_types(layers, period if window is not None else None)}


def _phi3(file: Fields) -> dict[str, Any]:
    config = _decoder(file)
    rope = read_longrope(file, config["head_dim"], config["max_position_embeddings"])
    window = file.window("attention.sliding_window")
    config |= {"model_type": "phi3", "rope_parameters": rope, "sliding_window": window}
    if "original_max_position_embeddings" in rope:  # Phi-3 has it outside
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return config


def _gpt2(file: Fields) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": file.whole("embedding_length"),
        "n_inner": file.whole("feed_forward_length"),
        "n_layer": file.whole("block_count"),
        "n_head": file.whole("attention.head_count"),
        "n_positions": file.whole("context_length"),
        "layer_norm_epsilon": file.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _decoder_metadata(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    parameters = rope_parameters(dict(config), _DEFAULT_THETA.get(spec.family, 10_000.0))
    if "full_attention" in parameters:  # Gemma 3 has two ropes; these keys describe the one of full attention
        parameters = parameters["full_attention"]
    rope, tensors = rope_metadata(parameters, spec.head_dim)
    metadata = {
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_hidden_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "vocab_size": spec.vocab_size,
    }
    if spec.experts:
        metadata |= {"expert_count": spec.experts.count, "expert_used_count": spec.experts.per_token}
    windows = set(spec.layer_windows) - {None}
    if len(windows) == 1:
        metadata["attention.sliding_window"] = windows.pop()
    for name, cap in (("attn", spec.attention_softcap), ("final", spec.logit_softcap)):
        if cap is not None:
            metadata[f"{name}_logit_softcapping"] = cap
    return metadata | rope, tensors


def _qwen3_moe_metadata(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    metadata, tensors = _decoder_metadata(spec, config)
    return metadata | {"expert_feed_forward_length": spec.intermediate_size}, tensors


def _phi3_metadata(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    metadata, tensors = _decoder_metadata(spec, config)
    parameters = rope_parameters(dict(config))
    if parameters["rope_type"] == "longrope":
        scaling, tensors = longrope_metadata(parameters, spec.ropes[0].scale)
        metadata |= scaling
    return metadata, tensors


def _granite_metadata(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    metadata, tensors = _decoder_metadata(spec, config)
    return metadata | {
        "attention.scale": spec.attention_scales[0],
        "embedding_scale": spec.embedding_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": float(config.get("logits_scaling") or 1.0),  # by which logits are divided
    }, tensors


def _gpt2_metadata(spec: DecoderSpec, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return {
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_hidden_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.layer_norm_epsilon": spec.norm_eps,
        "vocab_size": spec.vocab_size,
    }, {}


class Architecture(NamedTuple):
    """One `general.architecture` of GGUF."""

    read: Callable[[Fields], dict[str, Any]]  # the config, without the keys that `hf_config` adds
    # (spec, config) -> ({key without the architecture: value}, {name: further tensor})
    metadata: Callable[[DecoderSpec, Mapping[str, Any]], tuple[dict[str, Any], dict[str, np.ndarray]]] | None
    families: tuple[str, ...]  # the `model_type`s that are written as this
    unwritten: str = ""  # why they are not, where `metadata` is None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _decoder_metadata, ("llama", "mistral", "mixtral")),
    "qwen2": Architecture(_qwen, _decoder_metadata, ("qwen2",)),
    "qwen3": Architecture(_qwen, _decoder_metadata, ("qwen3",)),
    "qwen3moe": Architecture(_qwen3_moe, _qwen3_moe_metadata, ("qwen3_moe",)),
    "gemma2": Architecture(_gemma, _decoder_metadata, ("gemma2",)),
    "gemma3": Architecture(_gemma, _decoder_metadata, ("gemma3_text",)),
    "phi3": Architecture(_phi3, _phi3_metadata, ("phi3",)),
    "granite": Architecture(_granite, _granite_metadata, ("granite",)),
    "smollm3": Architecture(_smollm3, _decoder_metadata, ("smollm3",)),
    "gpt2": Architecture(_gpt2, _gpt2_metadata, ("gpt2",)),
    "gpt-oss": Architecture(_gpt_oss, None, ("gpt_oss",), _OTHER_YARN),
}


def architecture_of(family: str) -> str:
    """The GGUF architecture that a `model_type` is written as; UserError, with reason or list, if there is none."""
    names = {its: name for name, architecture in ARCHITECTURES.items() for its in architecture.families}
    found = ARCHITECTURES.get(names.get(family, ""))
    if found and found.metadata:
        return names[family]
    written = [its for its in sorted(names) if ARCHITECTURES[names[its]].metadata]
    raise UserError(
        f"a {family!r} model cannot be written as GGUF"
        + (f": {found.unwritten}" if found else f", only {', '.join(written)}")
        + "; export the Hugging Face format instead, which llama.cpp's convert_hf_to_gguf.py reads"
    )
