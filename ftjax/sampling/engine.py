"""Generation with a key/value cache: lists of prompts in batches, or one prompt as a stream.

Both use the same two compiled functions: `_prefill` reads the prompts and chooses the first token; `_decode` chooses
further tokens on the device, up to a limit, and ends early once every row has stopped. Rows are padded on the left, so
that all of them write to the same slot of the cache. Compiled shapes depend only on the batch size, the padded prompt
length (a multiple of `BUCKET`) and `max_new_tokens`, and are shared by all calls in a process.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.models.cache import Cache, init_cache
from ftjax.models.decoder import Decoder
from ftjax.sampling.sampler import Sampling, row_keys, sample, step_keys
from ftjax.tree import Tree

BUCKET = 16  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """The tokens generated for one prompt."""

    tokens: np.ndarray  # int32 [at most max_new_tokens], without the stop token
    stopped: bool  # whether a stop token ended it, and not max_new_tokens


def generate(
    model: Decoder,
    variables: Tree,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    batch_size: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Completes every prompt; returns the completions in the order of the prompts.

    A row's tokens do not depend on its batch, up to the rounding of the logits: its randomness follows from
    (sampling.seed, index of the prompt, number of tokens generated so far).

    variables: {"params": ..., "lora"?: ...}, on one device or sharded over the mesh of `jax.set_mesh`.
    prompts: int32 [length] each, length >= 1.
    stop_tokens: any of these token ids ends a row.
    batch_size: the most rows at once; on a mesh, rounded up to a multiple of the devices that share a batch.
    on_progress: called with (completed prompts, all prompts) after each batch.

    Raises UserError for an empty prompt, one with tokens outside the vocabulary, and one that together with
    max_new_tokens exceeds the model's positions.
    """
    _check(model, prompts, max_new_tokens, stop_tokens)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: use 1 or more")
    if not prompts:
        return []
    rows = rows_per_batch(len(prompts), batch_size)
    # Prompts of similar length share a batch, which saves computing padding.
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    is_stop = _stop_mask(model, stop_tokens)
    completions = {}
    for first in range(0, len(prompts), rows):
        indices = order[first : first + rows]
        state = _start(model, variables, prompts, indices, rows, max_new_tokens, is_stop, sampling)
        state = _decode(model, _static(sampling), variables, state, np.int32(max_new_tokens))
        tokens = np.asarray(state.tokens)[: len(indices), : int(state.count)]
        completions.update({index: _completion(row, is_stop) for index, row in zip(indices, tokens, strict=True)})
        if on_progress is not None:
            on_progress(len(completions), len(prompts))
    return [completions[index] for index in range(len(prompts))]


def stream(
    model: Decoder,
    variables: Tree,
    prompt: np.ndarray,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
) -> Iterator[int]:
    """The tokens of `generate(..., [prompt], ...)` one by one, as soon as each is known, without the stop token.

    prompt: int32 [length]. Raises what `generate` raises, at the call and not at the first token.
    """
    _check(model, [prompt], max_new_tokens, stop_tokens)
    return _stream(model, variables, prompt, max_new_tokens, _stop_mask(model, stop_tokens), sampling)


def _stream(
    model: Decoder, variables: Tree, prompt: np.ndarray, max_new_tokens: int, is_stop: np.ndarray, sampling: Sampling
) -> Iterator[int]:
    state = _start(model, variables, [prompt], np.zeros(1, np.int64), 1, max_new_tokens, is_stop, sampling)
    for count in range(1, max_new_tokens + 1):
        if bool(state.done[0]):
            return
        yield int(state.tokens[0, count - 1])
        if count < max_new_tokens:
            state = _decode(model, _static(sampling), variables, state, np.int32(count + 1))


@flax.struct.dataclass
class _State:
    """A batch during generation. The first `count` tokens are chosen, and all but the last of them are in the cache."""

    cache: Cache
    tokens: jax.Array  # int32 [batch, max_new_tokens]
    count: jax.Array  # int32 scalar, the same for all rows
    done: jax.Array  # bool [batch]: a stop token was chosen
    lengths: jax.Array  # int32 [batch], of the prompts; 0 in dummy rows
    keys: jax.Array  # PRNG keys [batch]
    is_stop: jax.Array  # bool [vocab]


def _start(
    model: Decoder,
    variables: Tree,
    prompts: Sequence[np.ndarray],
    indices: np.ndarray,  # of the prompts to be used
    rows: int,
    max_new_tokens: int,
    is_stop: np.ndarray,
    sampling: Sampling,
) -> _State:
    """Pads the prompts at `indices` to a batch of `rows` rows, with dummies for missing ones, and prefills it."""
    longest = max(len(prompts[index]) for index in indices)
    width = min(-(-longest // BUCKET) * BUCKET, model.spec.max_position_embeddings)
    batch = {
        "tokens": np.zeros((rows, width), np.int32),
        "lengths": np.zeros(rows, np.int32),
        "rows": np.zeros(rows, np.int32),
    }
    for row, index in enumerate(indices):
        prompt = prompts[index]
        batch["tokens"][row, width - len(prompt) :] = prompt
        batch["lengths"][row] = len(prompt)
        batch["rows"][row] = index
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        batch = {name: sharding.place(mesh, ("batch", "length")[: x.ndim], x) for name, x in batch.items()}
    return _prefill(model, _static(sampling), max_new_tokens, variables, batch, np.uint32(sampling.seed), is_stop)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    model: Decoder,
    sampling: Sampling,
    max_new_tokens: int,
    variables: Tree,
    batch: dict,
    seed: jax.Array,
    is_stop: jax.Array,
) -> _State:
    """Reads the prompts, makes a cache with room for max_new_tokens more, and chooses the first token of each row.

    batch: "tokens" int32 [batch, width], padded on the left; "lengths" and "rows" (index of the prompt) int32 [batch].
    """
    rows, width = batch["tokens"].shape
    padding = width - batch["lengths"][:, None]
    positions = jnp.arange(width) - padding
    hidden, cache = model.apply(
        variables,
        batch["tokens"],
        jnp.maximum(positions, 0),
        (positions >= 0).astype(jnp.int32),
        init_cache(model.spec, rows, width, model.dtype, reach=batch["lengths"] + max_new_tokens),
    )

    # The cache is extended after the prompts are read, so that they need not attend to empty slots.
    def extend(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, max_new_tokens if i == axis else 0) for i in range(x.ndim)])

    cache = cache.replace(
        keys=jax.tree.map(lambda keys: extend(keys, 2), cache.keys),
        values=jax.tree.map(lambda values: extend(values, 2), cache.values),
        positions=extend(cache.positions, 1),
        segment_ids=extend(cache.segment_ids, 1),
    )
    state = _State(
        cache=cache,
        tokens=jnp.zeros((rows, max_new_tokens), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done=batch["lengths"] == 0,  # nothing waits for dummy rows
        lengths=batch["lengths"],
        keys=row_keys(seed, batch["rows"]),
        is_stop=is_stop,
    )
    return _lay_out(_append_tokens(model, sampling, variables, state, hidden[:, -1]))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(model: Decoder, sampling: Sampling, variables: Tree, state: _State, limit: jax.Array) -> _State:
    """Chooses tokens until each row has `limit` of them or every row is done. The old state's buffers are donated."""

    def is_unfinished(state):
        return (state.count < limit) & ~state.done.all()

    def step(state):
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        positions = (state.lengths + state.count - 1)[:, None]
        hidden, cache = model.apply(variables, last, positions, jnp.ones_like(last), state.cache)
        return _append_tokens(model, sampling, variables, state.replace(cache=cache), hidden[:, 0])

    return _lay_out(jax.lax.while_loop(is_unfinished, step, state))


def _append_tokens(model: Decoder, sampling: Sampling, variables: Tree, state: _State, hidden: jax.Array) -> _State:
    """Chooses each row's next token from `hidden` [batch, D], and appends it."""
    logits = model.apply(variables, hidden, method="unembed")
    token = sample(logits, step_keys(state.keys, state.count), sampling)
    return state.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
        count=state.count + 1,
        done=state.done | state.is_stop[token],
    )


def _lay_out(state: _State) -> _State:
    """On a mesh: the cache is sharded like the activations; what the host reads is replicated."""
    cache = state.cache
    kv_axes = ("layers", "batch", "length", "kv_heads", None)
    return state.replace(
        cache=cache.replace(
            keys=jax.tree.map(lambda keys: sharding.constrain(keys, *kv_axes), cache.keys),
            values=jax.tree.map(lambda values: sharding.constrain(values, *kv_axes), cache.values),
        ),
        tokens=sharding.constrain(state.tokens, None, None),
        done=sharding.constrain(state.done, None),
        is_stop=sharding.constrain(state.is_stop, None),
    )


def _completion(row: np.ndarray, is_stop: np.ndarray) -> Completion:
    """Cuts a row at its first stop token. Tokens after it were chosen only because other rows were not done."""
    hits = np.flatnonzero(is_stop[row])
    return Completion(row[: hits[0]] if hits.size else row, stopped=bool(hits.size))


def _stop_mask(model: Decoder, stop_tokens: Sequence[int]) -> np.ndarray:
    """bool [vocab]: whether a token ends a row. Its shape, unlike that of a list, does not depend on how many do."""
    is_stop = np.zeros(model.spec.vocab_size, bool)
    is_stop[list(stop_tokens)] = True
    return is_stop


def _static(sampling: Sampling) -> Sampling:
    """The settings that the compiled code depends on: not the seed, which is an argument, and for greedy nothing."""
    return dataclasses.replace(sampling, seed=0) if sampling.temperature else Sampling()


def rows_per_batch(prompts: int, batch_size: int) -> int:
    """The size of equal batches, so that the last one has few dummy rows, rounded up to what the mesh divides."""
    rows = math.ceil(prompts / math.ceil(prompts / batch_size))
    mesh = jax.sharding.get_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    return math.ceil(rows / parts) * parts


def _check(model: Decoder, prompts: Sequence[np.ndarray], max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: use 1 or more")
    spec = model.spec
    if outside := [token for token in stop_tokens if not 0 <= token < spec.vocab_size]:
        raise UserError(f"stop tokens {outside} are outside the model's vocabulary of {spec.vocab_size}")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty; give it at least one token, such as the model's BOS token")
        if np.min(prompt) < 0 or np.max(prompt) >= spec.vocab_size:
            raise UserError(
                f"prompt {index} has token ids outside the model's vocabulary of {spec.vocab_size}; "
                "encode it with the tokenizer that belongs to the model"
            )
        if len(prompt) + max_new_tokens > spec.max_position_embeddings:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} it exceeds the "
                f"model's {spec.max_position_embeddings} positions; shorten the prompt or lower max_new_tokens"
            )
