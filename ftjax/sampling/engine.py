"""Generation: a fixed number of slots that prompts pass through, each as soon as one is free.

A row knows its own position, so that nothing is padded on the left and rows of any length share a batch; once an eighth
of them are through, the next prompts take their places. Equal prompts are read once, as what many begin with is
(prefix.py), and those that go on from an ended row's text from there on. How a row is sampled, when it ends and its
adapter (adapters.py) are its own: see slots.py, which is what is compiled. Ends by text (stop_strings.py) are the
host's to see.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.models.cache import carries_state
from ftjax.models.decoder import Decoder
from ftjax.models.kernels import choose as choose_kernel
from ftjax.sampling import adapters as stacked
from ftjax.sampling import slots as compiled
from ftjax.sampling.narrowed import narrowed
from ftjax.sampling.pictured import Pictured, placed, together
from ftjax.sampling.prefix import AHEAD, Prefix, gains, in_common
from ftjax.sampling.request import LIKELIEST, Completion, Left, Request, Row, allowed_next
from ftjax.sampling.sampler import Sampling
from ftjax.sampling.sizes import LENGTHS, STOPS, at_first, capacity, coarse, most_stops, padded, rounded
from ftjax.sampling.slots import Entering, Prompts, Read
from ftjax.sampling.stop_strings import StopsAt
from ftjax.tree import Tree

DISPATCH = 32  # tokens of a row that are chosen before the host looks
LOOKED_AT = 8  # the same where the host ends rows: those that it ends have been given up to so many in vain
TOKENS = 2**13  # of prompts that are read together, with padding, unless a single one is longer
PART = 512  # tokens of a long prompt that are read at a time, where attention holds dense scores
REUSED = 64  # tokens that a slot must have of a prompt to be gone on from, where prompts are else read together
CHAT = 1024  # tokens of the slot of a conversation at first: until then no turn but the first compiles anything


class Engine:
    """Slots and the requests that wait for one: `add` requests, then `step` until nothing is left.

    To be used under the mesh of `jax.set_mesh`, if any, that the variables are sharded over.

    Args:
      variables: {"params": ..., "lora"?: ..., "quant"?: ...}, on one device or sharded.
      slots: rows at once; on a mesh, rounded up to a multiple of the devices that share a batch.
      stops, biases: the most stop tokens and biased tokens of a request.
      adapters: what requests choose from, made by `adapters.stack`; from now on the engine's own.
      reuse: whether a prompt that begins as a row that has ended, such as the next turn of a chat, goes on from what
        that row left in its slot; only the rest is read. Its log-probabilities are the same up to rounding. Of a model
        whose layers carry a State (models/cache.py) it has to begin as all of that row, which no text has ended.
      room: the tokens that slots have room for at first.
      together: whether prompts that come together are read together; else each in parts of two lengths, so that prompts
        of all lengths and numbers compile little.
    """

    def __init__(
        self,
        model: Decoder,
        variables: Tree,
        slots: int,
        stops: int = STOPS,
        biases: int = 0,
        adapters: Tree | None = None,
        reuse: bool = False,
        room: int = 0,
        together: bool = True,
    ):
        if adapters is not None and "lora" in variables:
            raise ValueError("these variables have an adapter already; give the base's alone beside adapters")
        self._mesh = jax.sharding.get_mesh()
        self._model = model
        variables = narrowed(model, variables)
        self._variables = variables if adapters is None else variables | {stacked.COLLECTION: adapters}
        self._adapters = 0 if adapters is None else stacked.count(adapters)
        self._stops, self._biases = stops, biases
        self._rows: list[Row | None] = [None] * rounded(slots, self._mesh)
        self._waiting: deque[Row] = deque()
        self._reuse, self._room, self._together = reuse, room, together
        self._left: list[Left | None] = [None] * len(self._rows)
        self._prefix: Prefix | None = None
        self._carries = carries_state(model.spec)
        self._slots = None
        self._count = 0

    def add(self, request: Request) -> int:
        """Takes a request; returns its number among all of this engine, by which `step` calls it.

        Raises:
          UserError: it is empty, too long for the model, or has tokens that the model does not know.
          ValueError: it has more stop tokens or biased tokens than the engine was made for, or an adapter that it has
            not.
        """
        if request.adapter is not None and not 0 <= request.adapter < self._adapters:
            raise ValueError(f"adapter {request.adapter}: the engine has {self._adapters}, counted from 0")
        if len(request.stop_tokens) > self._stops or len(request.bias) > self._biases:
            raise ValueError(f"an engine for {self._stops} stop tokens and {self._biases} biased ones")
        request.check(self._model, f"prompt {self._count}")
        self._waiting.append(Row(self._count, request))
        self._count += 1
        return self._count - 1

    def cancel(self, number: int) -> Completion:
        """Gives up a request, by its number of `add`: `step` does not call it again, and its slot is free at the next.

        Returns what it has written so far, nothing of one that was still waiting; `stopped` is False. Other requests go
        on as if it had ended there.

        Raises:
          ValueError: there is no such request, or it has ended.
        """
        row = self._find(number)
        if row in self._waiting:
            self._waiting.remove(row)
        else:
            self._free(self._rows.index(row))
        return row.completion()

    def written(self, number: int) -> Completion:
        """What a request that has not ended has written so far; ValueError as of `cancel`."""
        return self._find(number).completion()

    def has(self, number: int) -> bool:
        """Whether there is a request of this number that has not ended."""
        return any(row is not None and row.index == number for row in [*self._rows, *self._waiting])

    def _find(self, number: int) -> Row:
        for row in [*self._rows, *self._waiting]:
            if row is not None and row.index == number:
                return row
        raise ValueError(f"request {number}: there is none of this number, or it has ended")

    def set_adapter(self, adapter: int, new: Tree | None) -> None:
        """Puts another adapter, as lora.py has them, into the place of one; None frees it. Nothing is compiled.

        Raises:
          UserError: `new` cannot be served, or is larger than the stack was made for.
          ValueError: there is no such place, or a request that has not ended uses it.
        """
        if not 0 <= adapter < self._adapters:
            raise ValueError(f"adapter {adapter}: the engine has {self._adapters}, counted from 0")
        if any(row is not None and row.request.adapter == adapter for row in [*self._rows, *self._waiting]):
            raise ValueError(f"adapter {adapter} is in use by requests that have not ended")
        adapters = stacked.replace(self._variables[stacked.COLLECTION], adapter, new)
        self._variables = self._variables | {stacked.COLLECTION: adapters}
        self._prefix = None
        self._left = [left if left is not None and left.adapter != adapter else None for left in self._left]

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._waiting) or any(self._rows)

    def step(self, limit: int = DISPATCH) -> tuple[dict[int, list[int]], dict[int, Completion]]:
        """Fills free slots, and chooses up to `limit` tokens of each row.

        Returns the new tokens of requests, stop tokens left out, and the completions of those that have ended.
        """
        while self._waiting and (free := [slot for slot, row in enumerate(self._rows) if row is None]):
            # What has been left the longest is overwritten first.
            free.sort(key=lambda slot: -1 if self._left[slot] is None else self._left[slot].row)
            taken = self._take(len(free))
            begun = self._begun(taken[0])
            if begun is not None and begun.length and begun.slot in free:
                free = [begun.slot, *(slot for slot in free if slot != begun.slot)]
            self._enter(free[: len(taken)], taken, begun)
        counts = [0 if row is None else len(row.tokens) for row in self._rows]
        self._decode(limit)
        new, ended = {}, {}
        for slot, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            if row is None:
                continue
            if tokens := row.text_tokens[count:]:
                new[row.index] = tokens
            if row.ended:
                ended[row.index] = row.completion()
                self._free(slot)
        return new, ended

    def _free(self, slot: int) -> None:
        """Takes the row out of its slot, where what it leaves may be gone on from."""
        row, self._rows[slot] = self._rows[slot], None
        # What stands in the places of images is not what their tokens say.
        if self._reuse and not (self._carries and row.at_text) and row.request.images is None:
            tokens = np.array([*row.request.prompt, *row.tokens][:-1], np.int32)
            long = row.long(self._model.spec)
            self._left[slot] = Left(tokens, row.request.row_adapter, long, row.index, self._carries)

    def _take(self, most: int) -> list[Row]:
        """The next rows whose prompts are read together: equal ones count once, and one read in parts is alone."""
        taken, unique, length, spec = [], set(), 0, self._model.spec
        while self._waiting and len(taken) < most:
            row = self._waiting[0]
            if taken and row.key(spec) not in unique:
                rows = self._rows_read(len(unique) + 1)
                tokens = rows * padded(max(length, len(row.request.prompt)), rows, self._model)
                if self._begun(row) or self._begun(taken[0]) or tokens > TOKENS:
                    break
            taken.append(self._waiting.popleft())
            unique.add(row.key(spec))
            length = max(length, len(row.request.prompt))
        return taken

    def _rows_read(self, prompts: int) -> int:
        """How many so many are read as, of which the rest is padding."""
        return coarse(prompts, len(self._rows))

    def _begun(self, row: Row) -> "_Begun | None":
        """Where the prompt of a row is read in parts, on from what there is of it; None where it is read whole."""
        if row.request.images is not None:
            return None
        best = _Begun(0, 0)
        for slot, left in enumerate(self._left):
            if left is None or left.adapter != row.request.row_adapter or left.long != row.long(self._model.spec):
                continue
            best = max(best, _Begun(left.shared(row.request.prompt), slot))
        # A single slot reads nothing together: there parts are all that compiles, for the first prompt as for others.
        alone = not self._together or (self._reuse and len(self._rows) == 1)
        if best.length < REUSED and not alone:
            best = _Begun(0, 0)
        return best if best.length or alone or self._is_long(row) else None

    def _is_long(self, row: Row) -> bool:
        """Whether attention would hold too many scores, were its prompt read whole."""
        length = len(row.request.prompt)
        if length <= 2 * PART:
            return False
        width = padded(length, 1, self._model)
        model, mesh = self._model, jax.sharding.get_abstract_mesh()
        return choose_kernel(model.attention, model.spec, model.dtype, width, mesh, model.matmul).name == "xla"

    def _enter(self, used: list[int], taken: list[Row], begun: "_Begun | None") -> None:
        """Reads the prompts of `taken`, the only one in parts where it is `begun`; puts them into the slots `used`."""
        for slot, row in zip(used, taken, strict=True):
            self._rows[slot], self._left[slot] = row, None
        self._make_room(max(row.length for row in taken))
        spec = self._model.spec
        unique = {row.key(spec): row for row in taken}
        numbers = {key: number for number, key in enumerate(unique)}
        size = coarse(len(taken), len(self._rows))

        def column(values: Sequence[int], rest: int) -> np.ndarray:
            return np.array([*values, *[rest] * (size - len(taken))], np.int32)

        prompts = [row.request.prompt for row in taken]
        entering = Entering(
            column([numbers[row.key(spec)] for row in taken], 0),
            column([len(prompt) for prompt in prompts], 1),
            column([int(prompt[-1]) for prompt in prompts], 0),
            column([row.reach for row in taken], 1),
            column(used, len(self._rows)),  # what fills up goes nowhere
            compiled.rows_of([row.request.rows() for row in taken], self._stops, self._biases, size),
        )
        rows = list(unique.values())
        read = self._read(rows, self._prefix_of(rows)) if begun is None else self._read_in_parts(rows[0], begun)
        self._slots = compiled.enter(self._slots, read, entering)

    def _prefix_of(self, rows: list[Row]) -> Prefix | None:
        """What these rows, which are read together, all begin with, read by now; None where they are read whole."""
        own, spec = rows[0].request, self._model.spec
        long = rows[0].long(spec)

        def prompts(some: Iterable[Row]) -> dict[tuple, np.ndarray]:
            return {row.key(spec): row.request.prompt for row in some if row.is_like(own, long, spec)}

        theirs = prompts(rows)
        if len(theirs) < len(rows):
            return None
        longest, last = max(map(len, theirs.values())), self._prefix
        if last and gains(len(last.tokens), longest) and all(last.begins(row, long) for row in rows):
            return last
        # Of those that come next as well, which then go on from it too, unless one of them begins otherwise.
        with_next = theirs | prompts(itertools.islice(self._waiting, AHEAD))
        lengths = (in_common(list(some.values())) for some in (with_next, theirs))
        if not (length := next((length for length in lengths if gains(length, longest)), 0)):
            return None
        alone = dataclasses.replace(own, prompt=own.prompt[: length + 1], max_new_tokens=rows[0].reach - length - 1)
        self._prefix = Prefix(own.prompt[:length], own.row_adapter, long, self._read([Row(-1, alone)], None))
        return self._prefix

    def _read(self, rows: list[Row], prefix: Prefix | None) -> Read:
        start = 0 if prefix is None else len(prefix.tokens)
        prompts = [row.request.prompt[start:] for row in rows]
        count = self._rows_read(len(rows))
        width = padded(max(map(len, prompts)), count, self._model)
        tokens, adapters = np.zeros((count, width), np.int32), np.full(count, -1, np.int32)
        lengths, reach = np.ones(count, np.int32), np.ones(count, np.int32)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens[i, : len(prompt)], lengths[i], reach[i] = prompt, len(prompt), row.reach
            adapters[i] = row.request.row_adapter
        images = together([row.request.images for row in rows], count, width)
        if not self._mesh.empty:
            tokens = sharding.place(self._mesh, ("batch", "length"), tokens)
            images = images and placed(self._mesh, images)
        given = Prompts(tokens, lengths, reach, adapters, images)
        if prefix is None:
            return compiled.read(self._model, self._variables, given)
        return compiled.read_after(self._model, self._variables, prefix.read, np.int32(start), given)

    def _read_in_parts(self, row: Row, begun: "_Begun") -> Read:
        """Parts of two lengths, since each is compiled. The last token of a prompt is read when the next is chosen."""
        prompt, start = row.request.prompt[:-1], begun.length
        reach, adapter = (np.array([value], np.int32) for value in (row.reach, row.request.row_adapter))
        cache = compiled.row(self._slots, np.int32(begun.slot), reach)
        while start < len(prompt):
            width = PART if len(prompt) - start >= PART else min(PART, LENGTHS)
            part = prompt[start : start + width]
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(part)] = part
            places = np.int32(start), np.int32(len(part))
            cache = compiled.read_on(self._model, self._variables, cache, tokens, adapter, *places)
            start += len(part)
        return Read(cache.keys, cache.values, cache.states)

    def _decode(self, limit: int) -> None:
        rows = [row for row in self._rows if row is not None]
        if not rows:
            return
        allowed = allowed_next(self._rows, self._model.spec.vocab_size)
        most = 1 if allowed is not None else LOOKED_AT if any(row.request.stops_at for row in rows) else DISPATCH
        limit = min(limit, most, max(row.left for row in rows))
        # Those that end before the others need no more.
        self._make_room(max(row.length + min(limit, row.left) for row in rows) - 1)
        # Where prompts wait, a few free slots do; to read prompts one by one would compile for more numbers of rows.
        enough = max(len(self._rows) // 8, 1) if self._waiting else len(self._rows) + 1
        used = np.array([row is not None for row in self._rows])
        numbers = np.int32(limit), np.int32(enough), allowed, LIKELIEST * any(row.request.likeliest for row in rows)
        self._slots, chosen, there = compiled.decode(
            self._model, DISPATCH, self._variables, self._slots, used, *numbers
        )
        chosen, there = jax.device_get((chosen, there))
        for slot, row in enumerate(self._rows):
            if row is not None:
                row.note(*(part[there[:, slot], slot] for part in chosen if part is not None))

    def _make_room(self, length: int) -> None:
        """Slots for rows of `length` tokens."""
        needed = capacity(max(length, self._room), self._model)
        if self._slots is None:
            slots = compiled.empty(self._model, len(self._rows), needed, self._stops, self._biases)
            self._slots = _beside(self._variables, slots)
        elif needed > self._slots.capacity:
            self._slots = compiled.grow(self._slots, needed)


class _Begun(NamedTuple):
    """How many tokens of a prompt are there, and where."""

    length: int
    slot: int


def generate(
    model: Decoder,
    variables: Tree,
    prompts: Sequence[np.ndarray | Pictured],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int],
    sampling: Sampling,
    batch_size: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
    first: int = 0,
    stops_at: StopsAt | None = None,
    numbers: Sequence[int] | None = None,
    between: Callable[[], None] | None = None,
) -> list[Completion]:
    """Completes every prompt; returns the completions in the order of the prompts.

    A row's tokens do not depend on its batch, up to the rounding of the logits: its randomness follows from
    (sampling.seed, first + index of the prompt, number of tokens generated so far).

    variables: {"params": ..., "lora"?: ...}, on one device or sharded over the mesh of `jax.set_mesh`.
    prompts: as of Request. max_new_tokens: of every row, or of each.
    stop_tokens: any of these token ids ends a row. stops_at: see Request.
    numbers: those of the rows, where they are not first, first + 1, ...
    batch_size: the most rows at once; on a mesh, rounded up to a multiple of the devices that share a batch.
    on_progress: called with (completed prompts, all prompts) whenever some have been completed. between: called after
    every dispatch of at most DISPATCH tokens of a row, equally often in every process; what it raises ends all.

    Raises UserError for an empty prompt, one with tokens outside the vocabulary, and one that together with
    max_new_tokens exceeds the model's positions.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: use 1 or more")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    numbers = range(first, first + len(prompts)) if numbers is None else numbers
    requests = [
        Request(prompt, limit, sampling, stop_tokens, number, stops_at=stops_at)
        for prompt, limit, number in zip(prompts, limits, numbers, strict=True)
    ]
    for number, request in enumerate(requests):
        request.check(model, f"prompt {number}")
    if not prompts:
        return []
    room = at_first(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    engine = Engine(model, variables, min(batch_size, len(prompts)), most_stops(stop_tokens), room=room)
    # Prompts of similar length are read together, which saves computing padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for number in order:
        engine.add(requests[number])
    completions = {}
    while engine.busy:
        _, ended = engine.step()
        if between is not None:
            between()
        completions |= {order[index]: completion for index, completion in ended.items()}
        if ended and on_progress is not None:
            on_progress(len(completions), len(prompts))
    return [completions[number] for number in range(len(prompts))]


def stream(
    model: Decoder,
    variables: Tree,
    prompt: np.ndarray | Pictured,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    stops_at: StopsAt | None = None,
) -> Iterator[int]:
    """The tokens of `generate(..., [prompt], ...)` one by one, as soon as each is known, without the stop token.

    prompt: as of Request. Raises what `generate` raises, at the call and not at the first token.
    """
    request = Request(prompt, max_new_tokens, sampling, stop_tokens, stops_at=stops_at)
    return stream_from(Engine(model, variables, 1, most_stops(stop_tokens)), request)


def stream_from(engine: Engine, request: Request) -> Iterator[int]:
    """The same of a request to an engine; what else is in it goes on with it. It ends where the request is canceled.

    Raises what `Engine.add` raises.
    """
    return _stream(engine, engine.add(request))


def _stream(engine: Engine, number: int) -> Iterator[int]:
    while engine.has(number):
        new, _ = engine.step(limit=1)
        yield from new.get(number, [])


def conversation(model: Decoder, variables: Tree, stop_tokens: Sequence[int]) -> Engine:
    """An engine for `stream_from`, turn after turn: each reads only what is new, and after the first nothing compiles
    until there are more than CHAT tokens, or PART come at once; from then on once for each doubling.
    """
    return Engine(model, variables, 1, most_stops(stop_tokens), reuse=True, room=CHAT)


def rows_per_batch(prompts: int, batch_size: int) -> int:
    """How many rows `generate` has at once."""
    return rounded(min(batch_size, prompts), jax.sharding.get_mesh())


def _beside(variables: Tree, slots: compiled.Slots) -> compiled.Slots:
    """The slots on the variables' device, where that is one: what is compiled depends on whether it is said which."""
    placed = [leaf.sharding for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array) and leaf.committed]
    if not placed or len(placed[0].device_set) > 1:
        return slots
    where = placed[0]
    return jax.device_put(slots, sharding.replicated(where.mesh) if isinstance(where, NamedSharding) else where)
