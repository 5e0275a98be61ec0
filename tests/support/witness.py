"""transformers' torch Llama with the weights of one of our parameter trees."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ftjax import tree
from support.tiny import Document

torch.set_num_threads(1)  # of so small matrices; more would wait for each other


def torch_llama(config: dict, params: tree.Tree) -> LlamaForCausalLM:
    """float32, eager attention; every parameter comes from `params`, and every one of `params` is used."""
    config = LlamaConfig(**config, attn_implementation="eager", bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    state = to_torch(params)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def torch_scores(config: dict, params: tree.Tree, kernel: np.ndarray) -> LlamaForSequenceClassification:
    """The same with a head of scores at the last token; kernel: [D, K]."""
    config = LlamaConfig(**config, num_labels=kernel.shape[1], attn_implementation="eager", pad_token_id=None)
    model = LlamaForSequenceClassification(config).eval()
    model.load_state_dict(to_torch(params) | {"score.weight": torch.tensor(kernel.T)}, strict=True)
    return model


def to_torch(params: tree.Tree) -> dict[str, torch.Tensor]:
    out = {}
    for path, leaf in tree.flatten(params).items():
        for name, part in _parts(path, np.asarray(leaf)):
            out[name] = torch.tensor(part)
    return out


def from_torch(tensors: dict[str, torch.Tensor], like: tree.Tree) -> dict[str, np.ndarray]:
    """{our path: array}, layers stacked, kernels transposed; every tensor must be asked for by a leaf of `like`."""
    left = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    out = {}
    for path, leaf in tree.flatten(like).items():
        names = [name for name, _ in _parts(path, np.asarray(leaf))]
        arrays = [left.pop(name).T if path.endswith("kernel") else left.pop(name) for name in names]
        out[path] = np.stack(arrays) if path.startswith("layers/") else arrays[0]
    assert not left, sorted(left)
    return out


def _parts(path: str, leaf: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(Hugging Face name, its array) for each layer of one of our leaves."""
    module, kind = path.rsplit("/", 1)
    turn = (lambda array: array.T) if kind == "kernel" else (lambda array: array)
    if module.startswith("layers/"):
        inner = module.removeprefix("layers/").replace("/", ".")
        return [(f"model.layers.{i}.{inner}.weight", turn(part)) for i, part in enumerate(leaf)]
    return [(f"{module}.weight" if module == "lm_head" else f"model.{module}.weight", turn(leaf))]


def torch_logits(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """One document alone, [n] -> [n, vocab]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


def torch_loss_sum(model: LlamaForCausalLM, docs: list[Document]) -> torch.Tensor:
    """Summed cross-entropy of the trained tokens, each document run alone."""
    total = torch.zeros(())
    for tokens, trained in docs:
        ids = torch.tensor(tokens, dtype=torch.long)
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + losses[torch.tensor(trained[1:])].sum()
    return total


def torch_gradients(model: LlamaForCausalLM, docs: list[Document]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch_loss_sum(model, docs).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
