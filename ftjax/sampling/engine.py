"""Generation: a fixed number of slots that prompts pass through, each as soon as one is free.

A row knows its own position, so that nothing is padded on the left and rows of any length share a batch; once an eighth
of them are through, the next prompts take their places. Equal prompts are read once. How a row is sampled and when it
ends are its own: see slots.py, which is what is compiled. Ends by text (stop_strings.py) are the host's to see.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from ftjax import sharding
from ftjax.errors import UserError
from ftjax.models.cache import init_cache
from ftjax.models.decoder import Decoder
from ftjax.models.kernels import choose as choose_kernel
from ftjax.models.spec import DecoderSpec
from ftjax.sampling import slots as compiled
from ftjax.sampling.sampler import Sampling, Settings
from ftjax.sampling.slots import Entering, Prompts, Read, Rows
from ftjax.sampling.stop_strings import StopsAt
from ftjax.tree import Tree

DISPATCH = 32  # tokens of a row that are chosen before the host looks
STOPS = 8  # stop tokens that rows have room for, so that calls with others compile nothing
LOOKED_AT = 8  # the same where the host ends rows: those that it ends have been given up to so many in vain
CAPACITY = 128  # tokens of a slot at first; doubled when a row needs more
LENGTHS = 32  # the shortest length that prompts are padded to; the others are its doubles
FEW = 2**8  # tokens, with padding, that are read so fast that only compiling counts
TOKENS = 2**13  # of prompts that are read together, with padding, unless a single one is longer
GREEDY = Sampling()
PART = 512  # tokens of a long prompt that are read at a time, where attention holds dense scores


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """The tokens generated for one prompt.

    logps, tempered_logps, full_logps: how likely each was, see sampler.Chosen; one more than there are tokens where a
    stop token ended it, of that.
    """

    tokens: np.ndarray  # int32 [at most max_new_tokens], without the stop token; with all that `stops_at` saw
    stopped: bool  # whether a stop token or `stops_at` ended it, and not max_new_tokens
    stop_token: int | None  # which
    logps: np.ndarray  # float32
    tempered_logps: np.ndarray  # float32
    full_logps: np.ndarray  # float32


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how it is to be completed.

    prompt: int32 [length], length >= 1.
    stop_tokens: any of these token ids ends it.
    stops_at: what else ends it, see stop_strings.stops_at.
    number: its randomness follows from (sampling.seed, number, number of tokens generated so far).
    bias: what is added to the logits of tokens.
    """

    prompt: np.ndarray
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: Sequence[int] = ()
    number: int = 0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stops_at: StopsAt | None = None

    def check(self, model: Decoder, name: str) -> None:
        """UserError for what the model cannot complete."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: use 1 or more")
        spec, length = model.spec, len(self.prompt)
        for what, tokens in (("stop tokens", self.stop_tokens), ("biased tokens", list(self.bias))):
            if outside := [token for token in tokens if not 0 <= token < spec.vocab_size]:
                raise UserError(f"{what} {outside} are outside the model's vocabulary of {spec.vocab_size}")
        if length == 0:
            raise UserError(f"{name} is empty; give it at least one token, such as the model's BOS token")
        if np.min(self.prompt) < 0 or np.max(self.prompt) >= spec.vocab_size:
            raise UserError(
                f"{name} has token ids outside the model's vocabulary of {spec.vocab_size}; "
                "encode it with the tokenizer that belongs to the model"
            )
        if length + self.max_new_tokens > spec.max_position_embeddings:
            raise UserError(
                f"{name} has {length} tokens, and with max_new_tokens={self.max_new_tokens} it exceeds the model's "
                f"{spec.max_position_embeddings} positions; shorten the prompt or lower max_new_tokens"
            )

    def rows(self) -> Rows:
        biased, biases = np.array(list(self.bias), np.int32), np.array(list(self.bias.values()), np.float32)
        stops = np.array(list(self.stop_tokens), np.int32)
        settings = Settings.of([self.sampling])
        return Rows(self.sampling.seed, self.number, self.max_new_tokens, settings, stops, biased, biases)


class _Row:
    """A request on its way."""

    def __init__(self, index: int, request: Request):
        self.index, self.request = index, request
        self.tokens: list[int] = []
        self.logps: list[list[float]] = []  # of each token, in the order of Chosen
        self._at_text = False  # whether `stops_at` ended it

    def note(self, tokens: np.ndarray, *logps: np.ndarray) -> None:
        """Adds what was chosen, up to where the text ends it."""
        stops_at = self.request.stops_at
        for token, *how_likely in zip(tokens.tolist(), *(part.tolist() for part in logps), strict=True):
            self.tokens.append(token)
            self.logps.append(how_likely)
            if stops_at is not None and self.stop_token is None and stops_at(self.tokens):
                self._at_text = True
                break

    @property
    def stop_token(self) -> int | None:
        return self.tokens[-1] if self.tokens and self.tokens[-1] in self.request.stop_tokens else None

    @property
    def text_tokens(self) -> list[int]:
        """Those without the stop token."""
        return self.tokens if self.stop_token is None else self.tokens[:-1]

    @property
    def stopped(self) -> bool:
        return self._at_text or self.stop_token is not None

    @property
    def ended(self) -> bool:
        return self.stopped or not self.left

    @property
    def left(self) -> int:
        """How many tokens may still be chosen."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens that are in the cache, or will be before the next one is chosen."""
        return len(self.request.prompt) + len(self.tokens)

    def completion(self) -> Completion:
        logps = np.array(self.logps, np.float32).reshape(-1, 3).T
        return Completion(np.array(self.text_tokens, np.int32), self.stopped, self.stop_token, *logps)


class Engine:
    """Slots and the requests that wait for one: `add` requests, then `step` until nothing is left.

    To be used under the mesh of `jax.set_mesh`, if any, that the variables are sharded over.

    Args:
      variables: {"params": ..., "lora"?: ..., "quant"?: ...}, on one device or sharded.
      slots: rows at once; on a mesh, rounded up to a multiple of the devices that share a batch.
      stops, biases: the most stop tokens and biased tokens of a request.
    """

    def __init__(self, model: Decoder, variables: Tree, slots: int, stops: int = STOPS, biases: int = 0):
        self._mesh = jax.sharding.get_mesh()
        self._model, self._variables = model, variables
        self._stops, self._biases = stops, biases
        self._rows: list[_Row | None] = [None] * rounded(slots, self._mesh)
        self._waiting: deque[_Row] = deque()
        self._slots = None
        self._count = 0

    def add(self, request: Request) -> int:
        """Takes a request; returns its number among all of this engine, by which `step` calls it.

        Raises:
          UserError: it is empty, too long for the model, or has tokens that the model does not know.
          ValueError: it has more stop tokens or biased tokens than the engine was made for.
        """
        if len(request.stop_tokens) > self._stops or len(request.bias) > self._biases:
            raise ValueError(f"an engine for {self._stops} stop tokens and {self._biases} biased ones")
        request.check(self._model, f"prompt {self._count}")
        self._waiting.append(_Row(self._count, request))
        self._count += 1
        return self._count - 1

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._waiting) or any(self._rows)

    def step(self, limit: int = DISPATCH) -> tuple[dict[int, list[int]], dict[int, Completion]]:
        """Fills free slots, and chooses up to `limit` tokens of each row.

        Returns the new tokens of requests, stop tokens left out, and the completions of those that have ended.
        """
        while self._waiting and (free := [slot for slot, row in enumerate(self._rows) if row is None]):
            taken = self._take(len(free))
            self._enter(free[: len(taken)], taken)
        counts = [0 if row is None else len(row.tokens) for row in self._rows]
        self._decode(limit)
        new, ended = {}, {}
        for slot, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            if row is None:
                continue
            if tokens := row.text_tokens[count:]:
                new[row.index] = tokens
            if row.ended:
                ended[row.index], self._rows[slot] = row.completion(), None
        return new, ended

    def _take(self, most: int) -> list[_Row]:
        """The next rows whose prompts are read together: equal ones count once, and a long one is alone."""
        taken, unique, length, spec = [], set(), 0, self._model.spec
        while self._waiting and len(taken) < most:
            row = self._waiting[0]
            if taken and _key(row, spec) not in unique:
                rows = self._rows_read(len(unique) + 1)
                tokens = rows * _padded(max(length, len(row.request.prompt)), rows, self._model)
                if self._is_long(row) or self._is_long(taken[0]) or tokens > TOKENS:
                    break
            taken.append(self._waiting.popleft())
            unique.add(_key(row, spec))
            length = max(length, len(row.request.prompt))
        return taken

    def _rows_read(self, prompts: int) -> int:
        """How many so many are read as, of which the rest is padding."""
        return _coarse(prompts, len(self._rows))

    def _is_long(self, row: _Row) -> bool:
        """Whether its prompt is read in parts."""
        length = len(row.request.prompt)
        if length <= 2 * PART:
            return False
        width = _padded(length, 1, self._model)
        model, mesh = self._model, jax.sharding.get_abstract_mesh()
        return choose_kernel(model.attention, model.spec, model.dtype, width, mesh).name == "xla"

    def _enter(self, used: list[int], taken: list[_Row]) -> None:
        """Reads the prompts of `taken`, and puts them into the slots `used`."""
        for slot, row in zip(used, taken, strict=True):
            self._rows[slot] = row
        self._make_room(max(row.length for row in taken))
        spec = self._model.spec
        unique = {_key(row, spec): row for row in taken}
        numbers = {key: number for number, key in enumerate(unique)}
        size = _coarse(len(taken), len(self._rows))

        def column(values: Sequence[int], rest: int) -> np.ndarray:
            return np.array([*values, *[rest] * (size - len(taken))], np.int32)

        prompts = [row.request.prompt for row in taken]
        entering = Entering(
            column([numbers[_key(row, spec)] for row in taken], 0),
            column([len(prompt) for prompt in prompts], 1),
            column([int(prompt[-1]) for prompt in prompts], 0),
            column([_reach(row) for row in taken], 1),
            column(used, len(self._rows)),  # what fills up goes nowhere
            compiled.rows_of([row.request.rows() for row in taken], self._stops, self._biases, size),
        )
        self._slots = compiled.enter(self._slots, self._read(list(unique.values())), entering)

    def _read(self, rows: list[_Row]) -> Read:
        prompts = [row.request.prompt for row in rows]
        if self._is_long(rows[0]):
            return self._read_in_parts(rows[0])
        count = self._rows_read(len(rows))
        width = _padded(max(map(len, prompts)), count, self._model)
        tokens, lengths, reach = np.zeros((count, width), np.int32), np.ones(count, np.int32), np.ones(count, np.int32)
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens[i, : len(prompt)], lengths[i], reach[i] = prompt, len(prompt), _reach(row)
        if not self._mesh.empty:
            tokens = sharding.place(self._mesh, ("batch", "length"), tokens)
        return compiled.read(self._model, self._variables, Prompts(tokens, lengths, reach))

    def _read_in_parts(self, row: _Row) -> Read:
        prompt = row.request.prompt
        model, width = self._model, -(-len(prompt) // PART) * PART
        cache = init_cache(model.spec, 1, capacity(width, model), model.dtype, np.array([_reach(row)], np.int32))
        for start in range(0, len(prompt), PART):
            tokens = np.zeros((1, PART), np.int32)
            part = prompt[start : start + PART]
            tokens[0, : len(part)] = part
            places = np.int32(start), np.int32(len(part))
            cache = compiled.read_on(model, self._variables, cache, tokens, *places)
        return Read(cache.keys, cache.values)

    def _decode(self, limit: int) -> None:
        rows = [row for row in self._rows if row is not None]
        if not rows:
            return
        most = LOOKED_AT if any(row.request.stops_at for row in rows) else DISPATCH
        limit = min(limit, most, max(row.left for row in rows))
        # Those that end before the others need no more.
        self._make_room(max(row.length + min(limit, row.left) for row in rows) - 1)
        # Where prompts wait, a few free slots do; to read prompts one by one would compile for more numbers of rows.
        enough = max(len(self._rows) // 8, 1) if self._waiting else len(self._rows) + 1
        used = np.array([row is not None for row in self._rows])
        self._slots, chosen, there = compiled.decode(
            self._model, DISPATCH, self._variables, self._slots, used, np.int32(limit), np.int32(enough)
        )
        chosen, there = jax.device_get((chosen, there))
        for slot, row in enumerate(self._rows):
            if row is not None:
                row.note(*(part[there[:, slot], slot] for part in chosen))

    def _make_room(self, length: int) -> None:
        """Slots for rows of `length` tokens."""
        needed = capacity(length, self._model)
        if self._slots is None:
            self._slots = compiled.empty(self._model, len(self._rows), needed, self._stops, self._biases)
        elif needed > self._slots.capacity:
            self._slots = compiled.grow(self._slots, needed)


def generate(
    model: Decoder,
    variables: Tree,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    batch_size: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
    first: int = 0,
    stops_at: StopsAt | None = None,
    between: Callable[[], None] | None = None,
) -> list[Completion]:
    """Completes every prompt; returns the completions in the order of the prompts.

    A row's tokens do not depend on its batch, up to the rounding of the logits: its randomness follows from
    (sampling.seed, first + index of the prompt, number of tokens generated so far).

    variables: {"params": ..., "lora"?: ...}, on one device or sharded over the mesh of `jax.set_mesh`.
    prompts: int32 [length] each, length >= 1.
    stop_tokens: any of these token ids ends a row. stops_at: see Request.
    batch_size: the most rows at once; on a mesh, rounded up to a multiple of the devices that share a batch.
    on_progress: called with (completed prompts, all prompts) whenever some have been completed. between: called after
    every dispatch of at most DISPATCH tokens of a row, equally often in every process; what it raises ends all.

    Raises UserError for an empty prompt, one with tokens outside the vocabulary, and one that together with
    max_new_tokens exceeds the model's positions.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: use 1 or more")
    requests = [
        Request(prompt, max_new_tokens, sampling, stop_tokens, number, stops_at=stops_at)
        for number, prompt in enumerate(prompts, first)
    ]
    for number, request in enumerate(requests):
        request.check(model, f"prompt {number}")
    if not prompts:
        return []
    engine = Engine(model, variables, min(batch_size, len(prompts)), _most(stop_tokens))
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
    prompt: np.ndarray,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    sampling: Sampling,
    stops_at: StopsAt | None = None,
) -> Iterator[int]:
    """The tokens of `generate(..., [prompt], ...)` one by one, as soon as each is known, without the stop token.

    prompt: int32 [length]. Raises what `generate` raises, at the call and not at the first token.
    """
    engine = Engine(model, variables, 1, _most(stop_tokens))
    engine.add(Request(prompt, max_new_tokens, sampling, stop_tokens, stops_at=stops_at))
    return _stream(engine)


def _stream(engine: Engine) -> Iterator[int]:
    while engine.busy:
        new, _ = engine.step(limit=1)
        yield from new.get(0, [])


def rows_per_batch(prompts: int, batch_size: int) -> int:
    """How many rows `generate` has at once."""
    return rounded(min(batch_size, prompts), jax.sharding.get_mesh())


def _key(row: _Row, spec: DecoderSpec) -> tuple[bytes, int]:
    """Rows of the same one leave the same in the cache. With LongRoPE that depends on how long a row may become."""
    is_long = any(rope.long_frequencies is not None for rope in spec.ropes)
    return np.asarray(row.request.prompt, np.int32).tobytes(), _reach(row) if is_long else 0


def _reach(row: _Row) -> int:
    return len(row.request.prompt) + row.request.max_new_tokens


def capacity(length: int, model: Decoder) -> int:
    """Tokens of a slot for rows of `length`: few sizes, since each is compiled."""
    return _within(_doubled(CAPACITY, length), length, model)


def _padded(length: int, rows: int, model: Decoder) -> int:
    """The length that so many prompts are padded to, the longest of which has `length` tokens.

    A double of LENGTHS where there are few tokens; for many, padding would cost more than compiling four times as many
    lengths.
    """
    size = _doubled(LENGTHS, length)
    if rows * size > FEW:
        size = -(-length // (size // 8)) * (size // 8)
    return _within(size, length, model)


def _doubled(size: int, least: int) -> int:
    """`size`, doubled until it is `least`."""
    while size < least:
        size *= 2
    return size


def _within(size: int, least: int, model: Decoder) -> int:
    """`size`, or what there is where the model has fewer positions; never less than `least`."""
    return max(min(size, model.spec.max_position_embeddings), least)


def _coarse(count: int, most: int) -> int:
    """A number of rows for `count` of them: few are compiled."""
    return min(2 ** math.ceil(math.log2(count)), most)


def _most(stop_tokens: Sequence[int]) -> int:
    """Room for stop tokens: STOPS, doubled until they fit."""
    return max(STOPS, 2 ** math.ceil(math.log2(max(len(stop_tokens), 1))))


def rounded(rows: int, mesh: jax.sharding.Mesh) -> int:
    """`rows`, or a few more: as many for each of the devices that share a batch."""
    parts = 1 if mesh.empty else sharding.row_parts(mesh)
    return math.ceil(rows / parts) * parts
