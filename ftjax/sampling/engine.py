"""Generation with a key/value cache: whole lists of prompts in batches, or one prompt as a stream.

Both are the same two compiled functions: `_prefill` reads the prompts and chooses the first token, `_decode` chooses up
to `limit` tokens on the device and ends early once every row has stopped. Rows are padded on the left, so that all of
them write the same cache slot; compiled shapes depend only on the batch size, the padded prompt length (a multiple of
`BUCKET`) and `max_new_tokens`, and are shared by all calls in a process.
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

BUCKET = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    tokens: np.ndarray  # int32 [n]: what was generated, without the stop token
    stopped: bool  # True: a stop token ended it; False: max_new_tokens did


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
    """Completes every prompt; the completions come in the prompts' order.

    variables: {"params": ...} or {"params": ..., "lora": ...}, on one device or sharded over the mesh of
    `jax.set_mesh`. prompts: int32 [n] each, n >= 1. stop_tokens: any of these ends a row. A row's tokens do not depend
    on the batch it is in, up to the rounding of the logits: its randomness is that of (sampling.seed, its number among
    `prompts`, tokens generated so far). At most batch_size rows run at once (on a mesh, rounded up to a multiple of the
    devices that share a batch). on_progress(done, total) is called after each batch.
    Raises UserError for an empty prompt, one with tokens outside the vocabulary, and one that with max_new_tokens does
    not fit the model's positions.
    """
    _check(model, prompts, max_new_tokens, stop_tokens)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: use 1 or more")
    if not prompts:
        return []
    rows = _rows_per_batch(len(prompts), batch_size)
    # Rows of like length share a batch: less padding to compute.
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    ends = _ends(model, stop_tokens)
    completions = {}
    for first in range(0, len(prompts), rows):
        numbers = order[first : first + rows]
        state = _start(model, variables, prompts, numbers, rows, max_new_tokens, ends, sampling)
        state = _decode(model, _static(sampling), variables, state, ends, np.int32(max_new_tokens))
        tokens = np.asarray(state.tokens)[: len(numbers), : int(state.count)]
        completions.update({number: _completion(row, ends) for number, row in zip(numbers, tokens, strict=True)})
        if on_progress is not None:
            on_progress(len(completions), len(prompts))
    return [completions[number] for number in range(len(prompts))]


def stream(
    model: Decoder,
    variables: Tree,
    prompt: np.ndarray,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
) -> Iterator[int]:
    """The tokens of `generate(..., [prompt], ...)` one by one, each as soon as it is known; the stop token is left out.

    Raises what `generate` raises, at the call and not at the first token.
    """
    _check(model, [prompt], max_new_tokens, stop_tokens)
    return _stream(model, variables, prompt, max_new_tokens, _ends(model, stop_tokens), sampling)


def _stream(model, variables, prompt, max_new_tokens, ends, sampling):
    state = _start(model, variables, [prompt], np.zeros(1, np.int64), 1, max_new_tokens, ends, sampling)
    for count in range(1, max_new_tokens + 1):
        if bool(state.done[0]):
            return
        yield int(state.tokens[0, count - 1])
        if count < max_new_tokens:
            state = _decode(model, _static(sampling), variables, state, ends, np.int32(count + 1))


@flax.struct.dataclass
class _State:
    """A batch under way. Tokens 0 .. count - 1 are chosen, and all but the last of them are in the cache."""

    cache: Cache
    tokens: jax.Array  # int32 [batch, max_new_tokens]
    count: jax.Array  # int32 scalar
    done: jax.Array  # bool [batch]
    lengths: jax.Array  # int32 [batch], of the prompts
    keys: jax.Array  # PRNG keys [batch]


def _start(model, variables, prompts, numbers, rows, max_new_tokens, ends, sampling) -> _State:
    """Pads the prompts with these numbers to one batch of `rows` rows (missing rows are dummies) and prefills it."""
    longest = max(len(prompts[number]) for number in numbers)
    width = min(-(-longest // BUCKET) * BUCKET, model.spec.max_position_embeddings)
    batch = {
        "tokens": np.zeros((rows, width), np.int32),
        "lengths": np.zeros(rows, np.int32),
        "rows": np.zeros(rows, np.int32),
    }
    for row, number in enumerate(numbers):
        prompt = prompts[number]
        batch["tokens"][row, width - len(prompt) :] = prompt
        batch["lengths"][row] = len(prompt)
        batch["rows"][row] = number
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        batch = {name: sharding.place(mesh, ("batch", "length")[: x.ndim], x) for name, x in batch.items()}
    return _prefill(model, _static(sampling), max_new_tokens, variables, batch, np.uint32(sampling.seed), ends)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    model: Decoder, sampling: Sampling, max_new_tokens: int, variables: Tree, batch: dict, seed, ends
) -> _State:
    """Reads the prompts, makes the cache with room for max_new_tokens more, and chooses the first token of each row."""
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

    # The room is added after the prompts are read, so that they need not attend to empty slots.
    def extend(x, axis):
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
        done=batch["lengths"] == 0,  # dummy rows need not be waited for
        lengths=batch["lengths"],
        keys=row_keys(seed, batch["rows"]),
    )
    return _lay_out(_choose(model, sampling, variables, state, hidden[:, -1], ends))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(model: Decoder, sampling: Sampling, variables: Tree, state: _State, ends, limit) -> _State:
    """Chooses tokens until each row has `limit` of them or every row is done. The old state's buffers are donated."""

    def under_way(state):
        return (state.count < limit) & ~state.done.all()

    def step(state):
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        positions = (state.lengths + state.count - 1)[:, None]
        hidden, cache = model.apply(variables, last, positions, jnp.ones_like(last), state.cache)
        return _choose(model, sampling, variables, state.replace(cache=cache), hidden[:, 0], ends)

    return _lay_out(jax.lax.while_loop(under_way, step, state))


def _choose(model, sampling, variables, state: _State, hidden: jax.Array, ends) -> _State:
    """Appends the token that follows from `hidden` [B, D] to each row."""
    logits = model.apply(variables, hidden, method="unembed")
    token = sample(logits, step_keys(state.keys, state.count), sampling)
    return state.replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
        count=state.count + 1,
        done=state.done | ends[token],
    )


def _lay_out(state: _State) -> _State:
    """On a mesh: the cache split like the activations, what the host reads whole on every device."""
    cache = state.cache
    kv_axes = ("layers", "batch", "length", "kv_heads", None)
    return state.replace(
        cache=cache.replace(
            keys=jax.tree.map(lambda keys: sharding.constrain(keys, *kv_axes), cache.keys),
            values=jax.tree.map(lambda values: sharding.constrain(values, *kv_axes), cache.values),
        ),
        tokens=sharding.constrain(state.tokens, None, None),
        done=sharding.constrain(state.done, None),
    )


def _completion(row: np.ndarray, ends: np.ndarray) -> Completion:
    """Cuts a row at its first stop token; what follows there is only what the batch's other rows were waited for."""
    hits = np.flatnonzero(ends[row])
    return Completion(row[: hits[0]] if hits.size else row, stopped=bool(hits.size))


def _ends(model: Decoder, stop_tokens: Sequence[int]) -> np.ndarray:
    """bool [vocab]: whether a token ends a row. Unlike a list of them it has one shape, however many there are."""
    ends = np.zeros(model.spec.vocab_size, bool)
    ends[list(stop_tokens)] = True
    return ends


def _static(sampling: Sampling) -> Sampling:
    """What of it the compiled code depends on: the seed is an argument there, and greedy needs nothing else."""
    return dataclasses.replace(sampling, seed=0) if sampling.temperature else Sampling()


def _rows_per_batch(prompts: int, batch_size: int) -> int:
    """Batches of equal size, so that the last one needs few dummy rows, and divided by the mesh if that can be."""
    rows = math.ceil(prompts / math.ceil(prompts / batch_size))
    mesh = jax.sharding.get_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    return math.ceil(rows / parts) * parts


def _check(model: Decoder, prompts: Sequence[np.ndarray], max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: use 1 or more")
    spec = model.spec
    if strange := [token for token in stop_tokens if not 0 <= token < spec.vocab_size]:
        raise UserError(f"stop tokens {strange} are outside the model's vocabulary of {spec.vocab_size}")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty; give it at least one token, such as the model's BOS token")
        if np.min(prompt) < 0 or np.max(prompt) >= spec.vocab_size:
            raise UserError(
                f"prompt {number} has token ids outside the model's vocabulary of {spec.vocab_size}; "
                "encode it with the tokenizer that belongs to the model"
            )
        if len(prompt) + max_new_tokens > spec.max_position_embeddings:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} it would pass the "
                f"model's {spec.max_position_embeddings} positions; shorten the prompt or lower max_new_tokens"
            )
