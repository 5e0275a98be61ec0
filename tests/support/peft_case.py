"""A small model in torch and here, with random adapters, written and read as PEFT directories."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.weights.load import load_params
from ftjax.weights.peft.adapter import BaseFacts, open_adapter, write_adapter
from ftjax.weights.source import open_source
from support.model_dirs import with_scale
from support.tiny import batch_of, documents, logits, one_device

RANK, ALPHA = 3, 5
TOKENS = documents(0, [12])[0][0]


BASE = BaseFacts("base", "0123")


def write(out, matrices, spec, scaled=False, **more):
    """scaled: `matrices` have their scales already."""
    write_adapter(out, matrices if scaled else with_scale(matrices, ALPHA / RANK), spec, BASE, **more)


def read(directory, spec, scaled=False):
    """(lora_a and lora_b, with their scales where it is `scaled`, settings)"""
    stored = open_adapter(directory, spec)
    _, matrices = tree.partition(stored.read()[0], lambda path: path.endswith("lora_scale"))
    return (stored.read()[0] if scaled else matrices), stored.settings


class Case:
    """A torch model of `config`, and ours of the same weights."""

    def __init__(self, model, path):
        self.torch, self.path = model, path
        model.save_pretrained(path)
        reader = open_source(path)
        self.spec = spec_from_config(reader.config)
        self.decoder = Decoder(self.spec)
        self.params = load_params(reader, self.spec, abstract_params(self.decoder, one_device()))
        self.kernels = lora.linear_kernels(tree.flatten(self.params))

    def adapters(self, targets, seed=0):
        """Random lora_a and lora_b for these targets, of a size that moves logits by about their own."""
        rng = np.random.default_rng(seed)
        leaves, out = tree.flatten(self.params), {}
        for path in lora.find_targets(targets, self.kernels):
            *stack, rows, columns = leaves[path].shape
            module = path.removesuffix("/kernel")
            out[f"{module}/lora_a"] = (rng.standard_normal((*stack, rows, RANK)) * rows**-0.5).astype(np.float32)
            out[f"{module}/lora_b"] = (rng.standard_normal((*stack, RANK, columns)) * 0.3).astype(np.float32)
        return tree.unflatten(out)

    def logits(self, adapters=None, scaled=False):
        """scaled: as of `write`."""
        batch = batch_of([[(TOKENS, np.ones(len(TOKENS), bool))]], len(TOKENS))
        variables = {"params": self.params}
        if adapters is not None:
            variables["lora"] = adapters if scaled else with_scale(adapters, ALPHA / RANK)
        return logits(self.decoder, variables, batch)[0]


def fresh(case):
    """The torch model without whatever peft hung into it."""
    return type(case.torch).from_pretrained(case.path, attn_implementation="eager").eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None], dtype=torch.long)).logits[0].numpy()


def saved_by_peft(case, path, targets, parameters):
    """A peft model with random B, saved in `path`."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, target_parameters=parameters, task_type="CAUSAL_LM"
    )
    model = get_peft_model(fresh(case), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return model
