"""The model that two processes write in test_together.py, and one process as well."""

import numpy as np

from ftjax import lora, tree
from ftjax.models.decoder import Decoder
from support import tiny

RANK = 2
CONFIG = tiny.CONFIG | {"vocab_size": 64, "tie_word_embeddings": False}


def spec():
    return tiny.spec_from_config(CONFIG)


def params():
    return tiny.numpy_params(Decoder(spec()))


def adapters():
    """The `lora` collection on all linear layers, of NumPy arrays."""
    rng = np.random.default_rng(1)
    leaves = tree.flatten(params())
    out = {}
    for path in lora.find_targets("all-linear", lora.linear_kernels(leaves)):
        *stack, rows, columns = leaves[path].shape
        module = path.removesuffix("/kernel")
        out[f"{module}/lora_a"] = rng.standard_normal((*stack, rows, RANK)).astype(np.float32)
        out[f"{module}/lora_b"] = rng.standard_normal((*stack, RANK, columns)).astype(np.float32)
        out[f"{module}/lora_scale"] = np.full(stack, 0.5, np.float32)
    return tree.unflatten(out)


def card():
    return "# an adapter\n"


def save_tokenizer(path):
    (path / "tokenizer.json").write_text("{}")
