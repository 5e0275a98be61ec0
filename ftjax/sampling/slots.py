"""The compiled half of the engine: rows of a batch that are filled, go on by a token at a time, and are freed.

`read` computes what a prompt leaves in the cache, by the kernels of training; `enter` puts it into free slots; `decode`
chooses tokens on the device. How rows are sampled and when they end are arrays, for which nothing compiles anew:
compiled shapes are the number of slots, their capacity and, of prompts, a coarse number and length.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ftjax import sharding
from ftjax.models.cache import Cache, State, init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.vision import Images
from ftjax.sampling import adapters
from ftjax.sampling.sampler import Chosen, Settings, choose, row_keys, step_keys
from ftjax.tree import Tree

# Logical axes of what is in the cache, keys and values alike.
KEYS = ("layers", "batch", "kv_heads", "length", None)
STATE = State(inputs=("layers", "batch", None, None), memory=("layers", "batch", "heads", None, None))


class Rows(NamedTuple):
    """What is asked of rows, [batch] each unless it says otherwise."""

    seeds: jax.Array  # uint32
    numbers: jax.Array  # int32: with the seed and the place of a token, what its randomness follows from
    left: jax.Array  # int32: how many tokens may still be chosen
    adapters: jax.Array  # int32: which of the stack, see adapters.py; -1 for none
    shifts: jax.Array  # int32: with M-RoPE how far a token that is written is turned beyond its position
    settings: Settings
    stops: jax.Array  # int32 [batch, S]: tokens that end the row; -1 for none
    biased: jax.Array  # int32 [batch, N]: tokens whose logits are changed; those of bias 0 do nothing
    biases: jax.Array  # float32 [batch, N]


@flax.struct.dataclass
class Slots:
    """The rows, used and free ones. The last token of a row goes through the model next: of a new one it is the last of
    its prompt. What is in the cache is of those before it.
    """

    cache: Cache
    tokens: jax.Array  # int32 [batch]: the last ones
    positions: jax.Array  # int32 [batch]: of these
    counts: jax.Array  # int32 [batch]: how many are chosen
    active: jax.Array  # bool [batch]: used, and not at an end
    rows: Rows

    @property
    def capacity(self) -> int:
        """The most tokens of a row."""
        return jax.tree.leaves(self.cache.keys)[0].shape[3]


class Prompts(NamedTuple):
    """Prompts to read, padded on the right."""

    tokens: jax.Array  # int32 [n, length]
    lengths: jax.Array  # int32 [n], 1 at least
    reach: jax.Array  # int32 [n], see Cache
    adapters: jax.Array  # int32 [n], see Rows
    images: Images | None = None  # of the prompts, if any has some


class Read(NamedTuple):
    """What prompts leave in the cache."""

    keys: Any  # [layers, n, kv_heads, length, head_dim] of each stack
    values: Any
    states: Any  # as Cache has them


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(model: Decoder, rows: int, capacity: int, stops: int, biases: int) -> Slots:
    """Free slots."""
    zeros = jnp.zeros(rows, jnp.int32)
    none = Rows(
        zeros.astype(jnp.uint32),
        *(zeros, zeros, zeros - 1, zeros),
        Settings(*(jnp.zeros(rows, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.float32))),
        jnp.full((rows, stops), -1, jnp.int32),
        *(jnp.zeros((rows, biases), dtype) for dtype in (jnp.int32, jnp.float32)),
    )
    cache = init_cache(model.spec, rows, capacity, model.dtype)
    return _lay_out(Slots(cache, zeros, zeros, zeros, zeros > 0, none))


def abstract(model: Decoder, rows: int, capacity: int, stops: int, biases: int, mesh: jax.sharding.Mesh) -> Slots:
    """The shapes of `empty`, laid out over `mesh`."""
    found = jax.eval_shape(functools.partial(empty, model, rows, capacity, stops, biases))

    def laid(x: jax.ShapeDtypeStruct, *axes: str | None) -> jax.ShapeDtypeStruct:
        placed = sharding.named(mesh, axes or (None,) * x.ndim, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

    cache = _each(found.cache, laid)
    found = jax.tree.map(laid, found)
    return found.replace(cache=cache.replace(reach=found.cache.reach))


@functools.partial(jax.jit, static_argnums=0)
def read(model: Decoder, variables: Tree, prompts: Prompts) -> Read:
    """Reads prompts up to their last tokens, which are read when the next are chosen."""
    count, length = prompts.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (count, length))
    segment_ids = (positions < prompts.lengths[:, None] - 1).astype(jnp.int32)
    variables = adapters.of_rows(variables, prompts.adapters)
    given = prompts.tokens, positions, segment_ids, prompts.reach, prompts.images
    _, found = model.apply(variables, *given, method="prefill")
    return Read(*found)


@functools.partial(jax.jit, static_argnums=0)
def read_after(model: Decoder, variables: Tree, prefix: Read, start: jax.Array, prompts: Prompts) -> Read:
    """`read` of what comes after the first `start` tokens of prompts, which are the same in all; prefix: what these
    left, of one row. Beside the scores between what is read and itself those to the prefix are held.
    """
    count, length = prompts.tokens.shape

    def for_all(part: jax.Array) -> jax.Array:
        return jnp.broadcast_to(part, (part.shape[0], count, *part.shape[2:]))

    def with_room(part: jax.Array) -> jax.Array:
        return for_all(jnp.pad(part, [(0, length if axis == 3 else 0) for axis in range(part.ndim)]))

    keys, values = jax.tree.map(with_room, (prefix.keys, prefix.values))
    cache = _split(Cache(keys, values, jax.tree.map(for_all, prefix.states), prompts.reach))
    variables = adapters.of_rows(variables, prompts.adapters)
    places = _after(model, start, prompts.lengths - 1, length)
    cache = _split(model.apply(variables, prompts.tokens, *places, cache)[1])
    return Read(cache.keys, cache.values, cache.states)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_on(
    model: Decoder,
    variables: Tree,
    cache: Cache,
    tokens: jax.Array,
    adapter: jax.Array,
    start: jax.Array,
    count: jax.Array,
) -> Cache:
    """Reads a part of a prompt, tokens int32 [1, length] of which `count` are there, after the `start` before.

    adapter: int32 [1], see Rows.
    """
    variables = adapters.of_rows(variables, adapter)
    places = _after(model, start, count[None], tokens.shape[1])
    return _split(model.apply(variables, tokens, *places, cache)[1])


def _after(model: Decoder, start: jax.Array, counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, int32 [n, length], of what comes after the `start` tokens before: counts [n] tokens. What
    pads them has positions of the model too: a table of positions gives NaN for others.
    """
    places = jnp.broadcast_to(jnp.arange(length), (len(counts), length))
    positions = jnp.minimum(start + places, model.spec.max_position_embeddings - 1)
    return positions, (places < counts[:, None]).astype(jnp.int32)


@jax.jit
def row(slots: Slots, slot: jax.Array, reach: jax.Array) -> Cache:
    """What is in one slot, for `read_on`; reach int32 [1], of the row that goes on from it."""

    def one(part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(part, slot, 1, axis=1)

    return _split(jax.tree.map(one, slots.cache.replace(reach=None)).replace(reach=reach))


class Entering(NamedTuple):
    """Rows that are given slots, [m] each."""

    prompt: jax.Array  # int32: which of those that were read; several rows may have the same
    lengths: jax.Array  # int32, of that
    last: jax.Array  # int32, its last token
    reach: jax.Array  # int32, of the row
    slot: jax.Array  # int32; one beyond the last is nowhere
    rows: Rows


@functools.partial(jax.jit, donate_argnums=0)
def enter(slots: Slots, read: Read, entering: Entering) -> Slots:
    """Puts rows into slots."""
    slot = entering.slot

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        length = min(new.shape[3], old.shape[3])  # what is beyond is padding
        part = new[:, entering.prompt, :, :length].astype(old.dtype)
        return old.at[:, slot, :, :length].set(part, mode="drop")

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[slot].set(new, mode="drop")

    def replace(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, slot].set(new[:, entering.prompt].astype(old.dtype), mode="drop")

    cache = slots.cache.replace(
        keys=jax.tree.map(insert, slots.cache.keys, read.keys),
        values=jax.tree.map(insert, slots.cache.values, read.values),
        states=jax.tree.map(replace, slots.cache.states, read.states),
        reach=put(slots.cache.reach, entering.reach),
    )
    slots = Slots(
        cache,
        put(slots.tokens, entering.last),
        put(slots.positions, entering.lengths - 1),
        put(slots.counts, jnp.zeros_like(slot)),
        put(slots.active, jnp.ones_like(slot, bool)),
        jax.tree.map(put, slots.rows, entering.rows),
    )
    return _lay_out(slots)


@functools.partial(jax.jit, static_argnums=(0, 1, 8), donate_argnums=3)
def decode(
    model: Decoder,
    most: int,
    variables: Tree,
    slots: Slots,
    used: jax.Array,
    limit: jax.Array,
    enough: jax.Array,
    allowed: jax.Array | None = None,
    likeliest: int = 0,
) -> tuple[Slots, Chosen, jax.Array]:
    """Chooses up to `limit` tokens of each active row, at most `most`; rows not `used`, bool [batch], have ended,
    whatever the slots say. allowed: int32 [batch, ceil(vocabulary / 32)], the tokens that a row may have, see
    request.Allows. likeliest: how many of these are returned besides.

    It ends early when no row is active any more, or as soon as `enough` have ended. Returns the slots, what was chosen
    [most, batch], and whether there it was, bool [most, batch].
    """
    variables = adapters.of_rows(variables, slots.rows.adapters)
    slots = slots.replace(active=slots.active & used)
    began = slots.active
    batch = len(began)
    nothing = Chosen(*(jnp.zeros((most, batch), dtype) for dtype in (jnp.int32, *[jnp.float32] * 3)))
    if likeliest:
        shape = (most, batch, min(likeliest, model.spec.vocab_size))
        nothing = nothing._replace(likeliest=jnp.zeros(shape, jnp.int32), likeliest_logps=jnp.zeros(shape))

    def goes_on(carry):
        slots, step, *_ = carry
        ended = (began & ~slots.active).sum()
        return (step < limit) & slots.active.any() & (ended < enough)

    def one(carry):
        slots, step, made, there = carry
        was = slots.active
        inputs = (slots.tokens[:, None], slots.positions[:, None], was[:, None].astype(jnp.int32))
        hidden, cache = model.apply(variables, *inputs, slots.cache, _turned(model, slots))
        chosen, left, active = _choose(model, variables, hidden[:, 0], slots.rows, slots.counts, allowed, likeliest)
        one_more = was.astype(jnp.int32)
        slots = slots.replace(
            cache=cache,
            tokens=jnp.where(was, chosen.tokens, slots.tokens),
            positions=slots.positions + one_more,
            counts=slots.counts + one_more,
            active=was & active,
            rows=slots.rows._replace(left=jnp.where(was, left, slots.rows.left)),
        )
        made = jax.tree.map(lambda all, new: all.at[step].set(new), made, chosen)
        return slots, step + 1, made, there.at[step].set(was)

    slots, _, made, there = jax.lax.while_loop(goes_on, one, (slots, 0, nothing, jnp.zeros((most, batch), bool)))
    return _lay_out(slots), _on_all(made), _on_all(there)


@functools.partial(jax.jit, static_argnums=1)
def grow(slots: Slots, capacity: int) -> Slots:
    """The slots with room for longer rows."""

    def longer(part: jax.Array) -> jax.Array:
        return jnp.pad(part, [(0, capacity - part.shape[3] if axis == 3 else 0) for axis in range(part.ndim)])

    keys, values = jax.tree.map(longer, (slots.cache.keys, slots.cache.values))
    return _lay_out(slots.replace(cache=slots.cache.replace(keys=keys, values=values)))


def _turned(model: Decoder, slots: Slots) -> Images | None:
    """Where the next tokens are in time and space, with M-RoPE."""
    if not model.spec.mrope:
        return None
    places = (slots.positions + slots.rows.shifts)[:, None, None]
    return Images(None, None, None, jnp.broadcast_to(places, (len(places), 1, 3)))


def _choose(
    model: Decoder,
    variables: Tree,
    hidden: jax.Array,
    rows: Rows,
    counts: jax.Array,
    allowed: jax.Array | None,
    likeliest: int,
) -> tuple[Chosen, jax.Array, jax.Array]:
    """The next token of rows from hidden [n, D]; how many may follow; and whether one does, bool [n]."""
    logits = model.apply(variables, hidden, method="unembed")
    if rows.biased.shape[1]:
        logits = logits.at[jnp.arange(len(logits))[:, None], rows.biased].add(rows.biases)
    if allowed is not None:
        bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
        logits = jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)
    keys = step_keys(row_keys(rows.seeds, rows.numbers), counts)
    chosen = choose(logits, keys, rows.settings, likeliest)
    left = rows.left - 1
    return chosen, left, (left > 0) & ~(chosen.tokens[:, None] == rows.stops).any(axis=-1)


def _lay_out(slots: Slots) -> Slots:
    """On a mesh: the cache is sharded like the activations; what the host reads is replicated."""
    cache = slots.cache.replace(reach=_on_all(slots.cache.reach))
    return _on_all(slots.replace(cache=None)).replace(cache=_split(cache))


def _split(cache: Cache) -> Cache:
    """Sharded like the activations."""
    return _each(cache, sharding.constrain)


def _each(cache: Cache, lay: Callable[..., Any]) -> Cache:
    """lay(array, *its logical axes) of all that is in the cache."""

    def attended(part: Any) -> Any:
        return lay(part, *KEYS)

    def state(part: State) -> State:
        return State(*(None if array is None else lay(array, *axes) for array, axes in zip(part, STATE, strict=True)))

    keys, values = jax.tree.map(attended, (cache.keys, cache.values))
    states = jax.tree.map(state, cache.states, is_leaf=lambda part: isinstance(part, State))
    return cache.replace(keys=keys, values=values, states=states)


def _on_all(arrays: Any) -> Any:
    """Whole on every device, for the hosts to read."""
    return jax.tree.map(lambda x: sharding.constrain(x, *[None] * x.ndim), arrays)


def rows_of(given: list[Rows], stops: int, biases: int, size: int) -> Rows:
    """NumPy arrays of `size` rows from `given`, each with NumPy scalars and short vectors; the rest is of the first."""

    def padded(vectors: list[np.ndarray], width: int, value: float) -> np.ndarray:
        return np.stack([np.pad(one, (0, width - len(one)), constant_values=value) for one in vectors])

    given = given + given[:1] * (size - len(given))
    columns = Rows(*zip(*given))
    return Rows(
        np.array(columns.seeds, np.uint32),
        np.array(columns.numbers, np.int32),
        np.array(columns.left, np.int32),
        np.array(columns.adapters, np.int32),
        np.array(columns.shifts, np.int32),
        Settings(*(np.concatenate(parts) for parts in zip(*columns.settings))),
        padded(columns.stops, stops, -1),
        padded(columns.biased, biases, 0),
        padded(columns.biases, biases, 0.0),
    )
