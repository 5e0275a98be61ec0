"""The output head taken apart: its arrays, which of their sides is the vocabulary, and logits of a part of that."""

import dataclasses
from collections.abc import Callable

import jax

from ftjax import tree
from ftjax.models.decoder import Decoder
from ftjax.tree import Tree

# The logical axes of a head's arrays, by their own names.
AXES: dict[str, tuple[str | None, ...]] = {
    "kernel": ("embed", "vocab"),
    "bias": ("vocab",),
    "embedding": ("vocab", "table"),  # of a head that is tied to it
    "lora_a": ("embed", None),
    "lora_b": (None, "vocab"),
    "lora_a0": ("embed", None),
    "lora_b0": (None, "vocab"),
    "lora_magnitude": ("vocab",),
    "lora_scale": (),
    "lora_dropout": (),
}

Head = dict[str, jax.Array]  # {path: array}
# (part of a head, hidden [n, D], rng or None, token_index int32 [n]: each token's index in the whole batch) -> logits
Unembed = Callable[[Head, jax.Array, jax.Array | None, jax.Array], jax.Array]


def width_axis(path: str) -> int | None:
    """Which side of an array of a head is the model's width."""
    return next((i for i, axis in enumerate(axes(path)) if axis in ("embed", "table")), None)


def axes(path: str) -> tuple[str | None, ...]:
    return AXES[path.rpartition("/")[2]]


def head_of(model: Decoder, variables: Tree) -> Head:
    """What `model.unembed` reads of the variables."""
    if model.spec.tie_word_embeddings:
        return {"params/embed_tokens/embedding": variables["params"]["embed_tokens"]["embedding"]}
    return {path: leaf for path, leaf in tree.flatten(variables).items() if path.split("/")[1] == "lm_head"}


def within(head: Head, columns: int) -> Head:
    """The head of the first `columns` of the vocabulary."""
    out = dict(head)
    for path, leaf in head.items():
        if "vocab" in axes(path) and leaf.shape[axes(path).index("vocab")] > columns:
            out[path] = jax.lax.slice_in_dim(leaf, 0, columns, axis=axes(path).index("vocab"))
    return out


def make_unembed(model: Decoder) -> Unembed:
    """Logits for the columns of the vocabulary that a head has: it is the head of a model with a smaller vocabulary."""

    def unembed(head: Head, hidden: jax.Array, rng: jax.Array | None, token_index: jax.Array) -> jax.Array:
        columns = next(
            leaf.shape[axes(path).index("vocab")] for path, leaf in head.items() if path.startswith("params/")
        )
        part = model.clone(spec=dataclasses.replace(model.spec, vocab_size=columns))
        rngs = None if rng is None else {"dropout": rng}
        return part.apply(tree.unflatten(head), hidden, token_index, method=part.unembed, rngs=rngs)

    return unembed


def at_temperature(temperature: float, unembed: Unembed) -> Unembed:
    """The same logits over a temperature."""
    return lambda *given: unembed(*given) / temperature
