"""Log-likelihoods of given continuations: what perplexity, multiple choice and forgetting are made of.

Rows have few lengths, powers of two, and the batches of one length are equal: so few shapes are compiled, and the same
items again, of other variables, need no new one. A batch has at most about as many tokens whatever its length, and so
takes the same memory. The logits are never whole (`objectives.cross_entropy`).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.objectives.cross_entropy import PLAIN, per_token
from ftjax.objectives.head import head_of, make_unembed
from ftjax.tree import Tree

SHORTEST = 32  # tokens of a row
TOKENS = 2048  # of a batch and a part of the mesh that has rows of its own

Tokens = np.ndarray | Sequence[int]


class Item(NamedTuple):
    """A continuation, which is measured, and what precedes it, which is not.

    Attributes:
      context: token ids, at least one: nothing predicts the first token of a document.
      continuation: token ids, at least one.
    """

    context: Tokens
    continuation: Tokens


class Likelihood(NamedTuple):
    """What a model says of one continuation.

    Attributes:
      logps: float32 [tokens], natural logarithms of the probability of each token after all before it.
      greedy: whether each token is the likeliest there, so that greedy decoding would write the continuation.
    """

    logps: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """log p of the whole continuation, in nats; summed in float64."""
        return float(self.logps.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        return len(self.logps)


def perplexity(found: Sequence[Likelihood]) -> float:
    """exp of the mean of -log p over all tokens of all continuations."""
    return math.exp(-sum(one.total for one in found) / sum(one.tokens for one in found))


class Batch(NamedTuple):
    """Items of similar length, one a row.

    Attributes:
      indices: int [n], which items they are.
      arrays: "tokens", "targets", "positions", "segment_ids" int32 and "wanted" bool, [rows, length]: targets are the
        next token; wanted are the places whose target belongs to a continuation. There may be more rows than items.
    """

    indices: np.ndarray
    arrays: dict[str, np.ndarray]

    def of_items(self, values: np.ndarray) -> list[np.ndarray]:
        """values [rows, length], one for each place -> those that are wanted, of each item."""
        return [values[row][self.arrays["wanted"][row]] for row in range(len(self.indices))]


def log_likelihoods(
    model: Decoder,
    variables: Tree,
    items: Sequence[Item],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every item, in their order.

    variables: {"params": ..., "lora"?: ...}, on one device or sharded over the mesh of `jax.set_mesh`; every process of
    a run calls it alike.
    on_progress: called with (done items, all items) after each batch.

    Raises:
      UserError: an item without its last token is longer than the model's positions.
      ValueError: an empty context or continuation, or token ids outside the vocabulary.
    """
    found, done = {}, 0
    for batch in batches(model, items):
        nll, correct = jax.device_get(_forward(model, variables, placed(batch.arrays)))
        for index, losses, hits in zip(batch.indices, batch.of_items(nll), batch.of_items(correct), strict=True):
            found[int(index)] = Likelihood(-losses, bool(hits.all()))
        done += len(batch.indices)
        if on_progress is not None:
            on_progress(done, len(items))
    return [found[index] for index in range(len(items))]


def batches(model: Decoder, items: Sequence[Item]) -> Iterator[Batch]:
    """The items in batches, the short ones first; errors are those of `log_likelihoods`, before the first batch."""
    _check(model, items)
    mesh = jax.sharding.get_mesh()
    sizes = np.array([len(item.context) + len(item.continuation) - 1 for item in items])  # the last is a target alone
    lengths = np.array([row_length(size, model.spec.max_position_embeddings, mesh) for size in sizes])
    for length in sorted(set(lengths.tolist())):
        indices = np.flatnonzero(lengths == length)
        rows = _rows(len(indices), length, mesh)
        for start in range(0, len(indices), rows):
            part = indices[start : start + rows]
            yield Batch(part, _fill([items[index] for index in part], rows, length))


def placed(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array | np.ndarray]:
    """Arrays [rows, length] on the mesh of `jax.set_mesh`, if there is one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return arrays
    return sharding.placed(mesh, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Decoder, variables: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(-log p(target), whether the target is the likeliest token), float32 [B, T] each; 0 where it is not wanted."""
    hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"])
    unembed, head = make_unembed(model), head_of(model, variables)
    found = per_token(unembed, None, PLAIN, head, hidden, batch["targets"], batch["wanted"], None)
    return tuple(sharding.constrain(values, None, None) for values in (found.nll, found.correct))  # whole, everywhere


def row_length(size: int, positions: int, mesh: Mesh) -> int:
    """The shortest length of a row that holds `size` tokens."""
    parts = 1 if mesh.empty else mesh.shape["context"]
    shortest = SHORTEST if parts == 1 else 128 * parts  # a part of a row has the length that attention kernels want
    return min(shortest * 2 ** max(math.ceil(math.log2(size / shortest)), 0), max(positions, size))


def _rows(count: int, length: int, mesh: Mesh) -> int:
    """The rows of equal batches of `count` items, so that the last has little padding; a multiple of the mesh's."""
    parts = 1 if mesh.empty else sharding.row_parts(mesh)
    rows = math.ceil(count / math.ceil(count / (max(TOKENS // length, 1) * parts)))
    return math.ceil(rows / parts) * parts


def _fill(items: Sequence[Item], rows: int, length: int) -> dict[str, np.ndarray]:
    """The arrays of `Batch`."""
    names = ("tokens", "targets", "positions", "segment_ids")
    arrays = {name: np.zeros((rows, length), np.int32) for name in names}
    arrays["wanted"] = np.zeros((rows, length), bool)
    for row, (context, continuation) in enumerate(items):
        tokens = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation, np.int32)])
        size = len(tokens) - 1
        arrays["tokens"][row, :size] = tokens[:-1]
        arrays["targets"][row, :size] = tokens[1:]
        arrays["positions"][row, :size] = np.arange(size)
        arrays["segment_ids"][row, :size] = 1
        arrays["wanted"][row, len(context) - 1 : size] = True
    return arrays


def _check(model: Decoder, items: Sequence[Item]) -> None:
    for index, (context, continuation) in enumerate(items):
        if not len(context) or not len(continuation):
            raise ValueError(f"item {index} has an empty context or continuation; either needs a token")
        ids = [*context, *continuation]
        if min(ids) < 0 or max(ids) >= model.spec.vocab_size:
            raise ValueError(f"item {index} has token ids outside the model's vocabulary of {model.spec.vocab_size}")
        if len(ids) - 1 > model.spec.max_position_embeddings:
            raise UserError(
                f"text {index} has {len(ids)} tokens, of which all but the last must fit the model's "
                f"{model.spec.max_position_embeddings} positions; shorten it"
            )
