"""The real peft around torch's Llama, with the adapters of one of our runs."""

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from support.adapted import Adapted
from support.tiny import CONFIG, numpy_params
from support.witness import torch_llama


def base_in_torch(**changes) -> LlamaForCausalLM:
    """Of tiny.CONFIG with changes; the same weights at every call."""
    config = CONFIG | changes
    return torch_llama(config, numpy_params(Decoder(spec_from_config(config))))


def peft_parameters(trained: tree.Tree) -> dict[str, np.ndarray]:
    """{peft's name: its array} of all that is trained: for linear layers [out, in]."""
    out = {}
    for path, leaf in tree.flatten(trained).items():
        module, name = path.partition("/")[2].rsplit("/", 1)
        for layer, part in enumerate(np.asarray(leaf) if module.startswith("layers/") else np.asarray(leaf)[None]):
            inner = module.replace("layers/", f"model.layers.{layer}.").replace("/", ".")
            inner = inner if inner.startswith(("model.", "lm_head")) else f"model.{inner}"
            turned = part.T if name.startswith("lora_") or name == "kernel" else part
            out[f"base_model.model.{inner}.{_peft_matrix(module, name)}"] = turned
    return out


def peft_model(base: LlamaForCausalLM, run: Adapted, **fields) -> PeftModel:
    """`base` with peft's adapters: exactly the parameters that `run` trains, each set to what it is there."""
    model = get_peft_model(base, LoraConfig(**{"lora_dropout": 0.0} | fields))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = peft_parameters(run.trained)
    assert named.keys() == ours.keys(), sorted(named.keys() ^ ours.keys())
    with torch.no_grad():
        for name, parameter in named.items():
            assert parameter.shape == ours[name].shape, name
            parameter.copy_(torch.tensor(ours[name].copy()))
    return model


def _peft_matrix(module: str, name: str) -> str:
    if name in ("lora_a", "lora_b"):
        letter = name[-1].upper()
        return f"lora_embedding_{letter}.default" if module == "embed_tokens" else f"lora_{letter}.default.weight"
    return "lora_magnitude_vector.default.weight" if name == "lora_magnitude" else "modules_to_save.default.weight"
