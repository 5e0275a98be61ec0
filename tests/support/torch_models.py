"""transformers' torch models of every family, small and random: the outside witness of the ports."""

import copy
import logging

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

torch.set_num_threads(1)  # of so small matrices; more would wait for each other
logging.getLogger("transformers").setLevel(logging.ERROR)  # it remarks on unusual rope factors, which are the point


def torch_model(config: dict, seed: int = 0) -> PreTrainedModel:
    """A float32 model in eval mode with eager attention, nothing in whose files is left at its initial constant.

    Kernels have variance 1 / in, so that logits are of order 1; vectors (norms, biases, sinks) are moved by 0.1, the
    corrections of routers by 0.2, enough to change which experts are chosen.
    """
    # A copy: transformers writes into the dicts that it is given.
    fields = copy.deepcopy({name: value for name, value in config.items() if name != "model_type"})
    torch.manual_seed(seed)  # Nemotron-H draws what it begins with in vectors, too
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="eager"
    ).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                if config["model_type"] == "nemotron" and name.endswith("norm.weight"):
                    parameter.zero_()  # it starts from 1, and 1 is added to it: twice as much in every layer
                if config["model_type"] in ("gemma3n_text", "gemma4_text") and name.endswith("q_norm.weight"):
                    parameter.mul_(parameter.shape[0] ** -0.5)  # it holds the scale of attention, which is 1 there
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                # [in, out] where a layer is stored so (GPT-2's Conv1D, GPT-OSS's and Llama 4's experts), else [out, in]
                stored = config["model_type"] in ("gpt2", "gpt_oss", "llama4_text") and (
                    ".c_" in name or ".experts." in name
                )
                parameter.normal_(std=parameter.shape[-2 if stored else -1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
            if name.endswith("layer_scalar"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model
