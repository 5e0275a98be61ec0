"""Small decoders with weights large enough that logits are of order 1, and hand-made batches for them."""

import functools

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from ftjax import config as configs
from ftjax import sharding, tree
from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.models.params import abstract_params
from ftjax.models.spec import DecoderSpec

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}

OPTIMIZER = configs.defaults().optimizer
SCHEDULE = ConfigDict(configs.defaults().schedule.to_dict() | {"name": "linear", "warmup_ratio": 0.1})

Document = tuple[np.ndarray, np.ndarray]  # tokens int32 [n], trained bool [n]


def spec(**changes) -> DecoderSpec:
    """Of CONFIG, with changes named as in a Hugging Face config.json."""
    return spec_from_config(CONFIG | changes)


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({}, jax.devices()[:1])


def numpy_params(model: Decoder, seed: int = 0) -> tree.Tree:
    """Gaussian kernels with variance 1 / in, norm scales around 1, as float32 NumPy arrays."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, leaf in tree.flatten(abstract_params(model, one_device())).items():
        noise = rng.standard_normal(leaf.shape)
        fan_in = leaf.shape[-1] if path.endswith("embedding") else leaf.shape[-2] if leaf.ndim > 1 else 1
        out[path] = (1 + 0.1 * noise if path.endswith(("scale", "layer_scalar")) else noise * fan_in**-0.5).astype(
            np.float32
        )
    return tree.unflatten(out)


def random_params(model: Decoder, seed: int, abstract: tree.Tree) -> tree.Tree:
    """As the layers themselves initialize them, made where `abstract`'s shardings put them."""

    def make():
        return nn.unbox(model.init(jax.random.key(seed), np.zeros((1, 1), np.int32), method=model.init_all)["params"])

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def documents(seed: int, lengths: list[int], vocab: int = CONFIG["vocab_size"]) -> list[Document]:
    """Random tokens; the first third of each document is a prompt that is not trained on."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, vocab, n).astype(np.int32), np.arange(n) >= max(1, n // 3)) for n in lengths]


def batch_of(rows: list[list[Document]], length: int, left: bool = False) -> dict[str, np.ndarray]:
    """One row per list of documents, laid one after the other; padded to `length` on the right, or on the left."""
    names = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "positions": np.int32}
    batch = {name: np.zeros((len(rows), length), dtype) for name, dtype in (names | {"segment_ids": np.int32}).items()}
    for row, docs in enumerate(rows):
        start = length - sum(len(tokens) for tokens, _ in docs) if left else 0
        for segment, (tokens, trained) in enumerate(docs, 1):
            end = start + len(tokens)
            batch["tokens"][row, start:end] = tokens
            batch["targets"][row, start : end - 1] = tokens[1:]
            batch["weights"][row, start : end - 1] = trained[1:]
            batch["positions"][row, start:end] = np.arange(len(tokens))
            batch["segment_ids"][row, start:end] = segment
            start = end
    return batch


def logits(model: Decoder, variables: tree.Tree, batch: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, T, vocab]"""
    return np.asarray(_forward(model, variables, batch["tokens"], batch["positions"], batch["segment_ids"]))


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables, tokens, positions, segment_ids):
    hidden, _ = model.apply(variables, tokens, positions, segment_ids)
    return model.apply(variables, hidden, method=model.unembed)
