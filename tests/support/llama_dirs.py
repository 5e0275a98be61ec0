"""Hugging Face directories made by transformers itself, and how the tests look at arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.models.params import abstract_params
from ftjax.models.spec import DecoderSpec
from support.tiny import CONFIG


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama of the shape of `tiny.CONFIG`, no two tensors alike, norms included."""
    torch.manual_seed(0)
    config = CONFIG | {"tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(dtype)


def abstract(of: DecoderSpec, dtype=jnp.float32) -> tree.Tree:
    """What the decoder itself says it needs, without shardings."""
    mesh = jax.make_mesh((1,) * 5, ("data", "fsdp", "tensor", "context", "expert"), devices=jax.devices()[:1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(Decoder(of), mesh))


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Bit for bit; bfloat16 by way of int16, since torch has no NumPy array of it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.detach().numpy()


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def assert_is_model(params: tree.Tree, model: LlamaForCausalLM) -> None:
    """Every array of ours is, bit for bit, torch's transposed and stacked; all of torch's are used."""
    state = {name: as_numpy(tensor) for name, tensor in model.named_parameters()}  # a tied head once
    for path, leaf in tree.flatten(params).items():
        module, kind = path.rsplit("/", 1)
        dotted = module.replace("/", ".")
        prefix = "" if module == "lm_head" else "model."
        parts = list(leaf) if module.startswith("layers/") else [leaf]
        for layer, part in enumerate(parts):
            name = f"{prefix}{dotted.replace('layers.', f'layers.{layer}.', 1)}.weight"
            expected = state.pop(name)
            assert_same_bits(
                np.ascontiguousarray(part), np.ascontiguousarray(expected.T if kind == "kernel" else expected)
            )
    assert not state, f"never loaded: {sorted(state)}"


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")
