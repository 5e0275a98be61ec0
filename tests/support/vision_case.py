"""A small vision-language model in torch and here, with rows of documents around images."""

import copy

import jax
import numpy as np
import torch

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.models.vision import images_of
from ftjax.objectives.sft import make_sft
from ftjax.weights.load import load_params
from ftjax.weights.source import open_source
from support.model_dirs import with_scale
from support.tiny import one_device
from support.vision import pictured, pictured_batch, torch_gradients, torch_model

ROWS, LENGTH, PATCHES = 3, 96, 144  # of every batch here, so that each config is compiled once
INPUTS = ("tokens", "positions", "segment_ids")
# Of images of any size, in patches: with whole and broken windows, wide and high.
SIZES = [(4, 4), (2, 6), (8, 6), (2, 2), (6, 10)]


def read(path):
    reader = open_source(path)
    decoder = Decoder(spec_from_config(reader.config, vision=True))
    return decoder, load_params(reader, decoder.spec, abstract_params(decoder, one_device()))


class Case:
    """One config: `torch`, its model in transformers; `decoder` and `params`, ours; `run` of a batch."""

    def __init__(self, config, path):
        self.path, self.torch = path, torch_model(config)
        self.torch.save_pretrained(path / "model")
        self.decoder, self.params = read(path / "model")
        self.vision = self.decoder.spec.vision
        objective = make_sft(self.decoder)

        @jax.jit
        def run(params, batch):
            variables = {"params": params}
            hidden, _ = self.decoder.apply(variables, *(batch[name] for name in INPUTS), images=images_of(batch))
            logits = self.decoder.apply(variables, hidden, method=self.decoder.unembed)
            gradients = jax.grad(lambda params: objective({"params": params}, batch, jax.random.key(0)).sum)(params)
            return logits, gradients

        self.run = lambda batch: jax.device_get(run(self.params, batch))

        @jax.jit
        def logits(variables, batch):
            hidden, _ = self.decoder.apply(variables, *(batch[name] for name in INPUTS), images=images_of(batch))
            return self.decoder.apply(variables, hidden, method=self.decoder.unembed)

        self.logits = lambda batch, **more: jax.device_get(logits({"params": self.params} | more, batch))

    def doc(self, texts, seed):
        """Text around len(texts) - 1 images."""
        grid = self.vision.grid
        sizes = [(grid, grid)] * 9 if grid else SIZES[seed % len(SIZES) :] + SIZES
        return pictured(self.vision, sizes[: len(texts) - 1], texts, seed)

    def batch(self, rows):
        return pictured_batch(self.torch, self.vision, rows + [[]] * (ROWS - len(rows)), LENGTH, PATCHES)

    def torch_gradients(self, docs):
        """Torch's gradients of the summed loss as a tree of ours: they travel as if they were weights."""
        carrier, gradients = copy.deepcopy(self.torch), torch_gradients(self.torch, self.vision, docs)
        with torch.no_grad():
            for name, parameter in carrier.named_parameters():
                parameter.copy_(gradients[name])
        carrier.save_pretrained(self.path / "gradients")
        return read(self.path / "gradients")[1]


def random_adapters(params, targets, rank, scale):
    """Of a size that moves logits by about their own."""
    rng, leaves, out = np.random.default_rng(0), tree.flatten(params), {}
    for path in lora.find_targets(targets, lora.adaptable(leaves)):
        *stack, rows, columns = leaves[path].shape
        module = path.removesuffix("/kernel")
        out[f"{module}/lora_a"] = (rng.standard_normal((*stack, rows, rank)) * rows**-0.5).astype(np.float32)
        out[f"{module}/lora_b"] = (rng.standard_normal((*stack, rank, columns)) * 0.3).astype(np.float32)
    return with_scale(tree.unflatten(out), scale)
