"""Completions for whoever asks, at any time: a thread that owns an engine, and the event loop's end of it.

The thread takes requests from a queue, lets them into the engine where a slot is free, and hands on their tokens after
each dispatch. Adapters are read as they are asked for, into the places of an engine that rows choose from; the one that
was asked for the longest time ago makes room, once no row uses it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import llguidance.hf
import numpy as np
from jax.sharding import NamedSharding

from ftjax import adapted, lora, tree
from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.hosted.refusals import Refused
from ftjax.sampling.adapters import stack
from ftjax.sampling.engine import Engine
from ftjax.sampling.request import Completion, Request
from ftjax.tree import Tree

log = logging.getLogger(__name__)

STOPS = 32  # end tokens of a request, at most
BIASES = 300  # tokens of `logit_bias`, at most
ENTERING = 4  # the part of the slots, one in so many, for which prompts are read between two dispatches
FAILURES = 3  # of the engine one after another, after which the thread ends


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much at once.

    slots: rows that are written together. waiting: requests beyond these, before others are turned away.
    context: the most tokens of a prompt and its completion; of a model of fewer positions, these.
    places: adapters that are loaded together. rank, targets: what they may have, see sampling.adapters.stack.
    room: the tokens that a row has room for at first; more compile once for each doubling.
    dispatch: tokens of a row before the others' are handed on and the next prompts enter.

    Raises:
      UserError: a number is too small.
    """

    slots: int = 16
    waiting: int = 256
    context: int = 4096
    places: int = 8
    rank: int = 16
    targets: str = "all-linear"
    room: int = 512
    dispatch: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "waiting" else 1
            if field.name != "targets" and not (type(value) is int and value >= least):
                raise UserError(f"{field.name}={value!r}: use a whole number, {least} or more")


class Part(NamedTuple):
    """What has been written to one of the requests of a call since the last part of it.

    request: which, counted from 0.
    logps: float of each token under the model's own distribution, where they were asked for.
    likeliest: of each the tokens that were likeliest in its place and their logps, of requests for `likeliest`.
    completion: the whole, where it has ended.
    """

    request: int
    tokens: list[int]
    logps: list[float]
    completion: Completion | None
    likeliest: list[list[tuple[int, float]]] | None = None


class Writing:
    """The parts of a call as they come, once over. `close` gives up what has not ended."""

    def __init__(self, count: int, give_up: Callable[[], None]):
        self._left, self._give_up = count, give_up
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[Part | Refused] = asyncio.Queue()

    def put(self, part: Part | Refused) -> None:
        """For the thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    async def __aiter__(self) -> AsyncIterator[Part]:
        while self._left:
            part = await self._parts.get()
            if isinstance(part, Refused):
                raise part
            self._left -= part.completion is not None
            yield part

    def close(self) -> None:
        if self._left:
            self._left = 0
            self._give_up()


@dataclasses.dataclass(eq=False)
class _Asked:
    """One request on its way through the thread."""

    request: Request
    adapter: Path | None
    index: int  # among those of its call
    writing: Writing
    logps: bool
    number: int = -1  # the engine's
    sent: int = 0  # tokens that were handed on


class Generation:
    """Starts the thread, which is ended by `close`.

    Args:
      base: the model, see adapted.load_model.
      variables: those of the base alone, on one device or on a mesh.
      turns: held while the engine computes, where other threads compute on its devices.

    Raises:
      UserError: the model has no layer of `limits.targets`.
    """

    def __init__(
        self,
        base: Base,
        variables: Tree,
        limits: Limits | None = None,
        turns: contextlib.AbstractContextManager | None = None,
    ):
        self.base, self.limits = base, limits or Limits()
        self._variables, self._facts = variables, adapted.facts_of(base)
        self._turns = turns or contextlib.nullcontext()
        self.context = min(self.limits.context, base.model.spec.max_position_embeddings)
        self._targets = lora.find_targets(self.limits.targets, lora.adaptable(tree.flatten(variables["params"])))
        self.vocabulary = llguidance.hf.from_tokenizer(
            base.tokenizer, max(base.model.spec.vocab_size, len(base.tokenizer)), list(base.end_tokens)
        )
        self._widest = max(map(len, base.tokenizer.get_vocab()))  # characters of a token
        self.encoding = threading.Lock()  # whose holder encodes: a tokenizer does so for one thread at a time
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the two that follow
        self._open = 0  # requests that have not ended
        self._alive = True
        self._waiting: list[_Asked] = []
        self._running: dict[int, _Asked] = {}
        self._loaded: OrderedDict[Path, int] = OrderedDict()  # adapters and their places, as they were last used
        self._free: list[int] = []
        self._failures = 0
        self.tokens = 0  # that have been written
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered; what /healthz says."""
        return self._alive and self._thread.is_alive()

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: of the base's weights."""
        return f"fp_{self._facts.digest[:12]}"

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, of which several may be one character."""
        return self.vocabulary.decode_bytes([token])

    @property
    def open(self) -> int:
        """How many requests have not ended."""
        return self._open

    @property
    def running(self) -> int:
        """How many of them have a slot."""
        return len(self._running)

    def ask(self, requests: Sequence[Request], adapter: Path | None, logps: bool = False) -> Writing:
        """Takes the requests of one call, all or none; to be called on an event loop, which then awaits the parts.

        adapter: the folder of a PEFT adapter over the base, for all of them; their own `adapter` is not looked at.

        Raises:
          Refused: 503, as many as may wait do, or the thread has ended.
        """
        asked: list[_Asked] = []
        writing = Writing(len(requests), lambda: self._inbox.put(lambda: self._give_up(asked)))
        asked += [_Asked(request, adapter, index, writing, logps) for index, request in enumerate(requests)]
        most = self.limits.slots + self.limits.waiting
        if len(asked) > most:
            raise Refused(f"The request is for {len(asked)} completions; ask for up to {most} at once.", param="n")
        with self._lock:
            if not self._alive:
                raise _dead()
            if self._open + len(asked) > most:
                raise Refused(
                    f"The server is busy: {self._open} completions are being written or wait, of at most {most}; try "
                    "again in a moment.",
                    code="overloaded",
                    status=503,
                    headers={"retry-after": "1"},
                )
            self._open += len(asked)
            self._inbox.put(lambda: self._waiting.extend(asked))
        return writing

    def check_length(self, *texts: Any, param: str) -> None:
        """Refused where texts, wherever in lists and dicts, are longer than all tokens of the context could be.

        To be asked before they are encoded: megabytes take a minute, for which all others would wait.
        """
        characters, left = 0, list(texts)
        while left:
            value = left.pop()
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, dict | list):
                left += value.values() if isinstance(value, dict) else value
        if characters > self.context * self._widest:
            raise Refused(
                f"This model's maximum context length is {self.context} tokens. However, the {characters:,} characters "
                f"of your {param} are more. Please reduce the length of the {param}.",
                param=param,
                code="context_length_exceeded",
            )

    def room(self, prompt: int, wanted: int | None, param: str) -> int:
        """How many tokens may follow a prompt of so many; Refused in OpenAI's words where these are too many.

        wanted: how many are asked for, if that is said.
        """
        left = self.context - prompt
        if left < (wanted or 1):
            asked = f"{prompt + wanted} tokens ({prompt} in the {param}, {wanted} in the completion)" if wanted else ""
            said = f"you requested {asked}" if wanted and left > 0 else f"your {param} resulted in {prompt} tokens"
            raise Refused(
                f"This model's maximum context length is {self.context} tokens. However, {said}. Please reduce the "
                f"length of the {param}{' or completion' if wanted else ''}.",
                param=param,
                code="context_length_exceeded",
            )
        return wanted or left

    def close(self) -> None:
        """Ends the thread; what has not ended is refused with a 503."""
        self._inbox.put(None)
        self._thread.join()

    # What follows is the thread's.

    def _run(self) -> None:
        try:
            with _on_mesh(self._variables):
                with self._turns:
                    self._begin()
                    self._warm()
                while self._take():
                    with self._turns:
                        self._admit()
                        self._step()
        except Exception:  # whoever waits would do so for ever; /healthz says that the thread has ended
            log.exception("the thread that writes completions has ended")
        finally:
            with self._lock:
                self._alive = False
            with contextlib.suppress(queue.Empty):
                while True:
                    if do := self._inbox.get_nowait():
                        do()
            self._fail([*self._waiting, *self._running.values()], _dead())

    def _begin(self) -> None:
        """A new engine, with nothing in it."""
        limits, model = self.limits, self.base.model
        adapters = stack(model, self._variables, [None] * limits.places, limits.rank, self._targets)
        how = {"reuse": True, "room": limits.room, "together": False}
        self._engine = Engine(model, self._variables, limits.slots, STOPS, BIASES, adapters, **how)
        self._loaded.clear()
        self._free = list(range(limits.places))

    def _warm(self) -> None:
        """Compiles what every request needs, before the first one waits for it."""
        self._engine.add(Request(np.zeros(2, np.int32), 1))
        while self._engine.busy:
            self._engine.step(self.limits.dispatch)

    def _take(self) -> bool:
        """Does what has been asked for, for which it waits where there is nothing else to do; whether to go on."""
        while True:
            try:
                do = self._inbox.get(block=not (self._waiting or self._running))
            except queue.Empty:
                return True
            if do is None:
                return False
            do()

    def _admit(self) -> None:
        """Lets those into the engine for which there is a slot, and a place for their adapter.

        Nobody is overtaken for ever: who waits for a place claims the one that was last used the longest time ago, into
        whose slots then nobody else comes.
        """
        claims: dict[Path, Path] = {}  # the adapter that waits, and the one it waits for
        # A few at a time, since nothing is written while prompts are read.
        most = min(self.limits.slots, len(self._running) + max(self.limits.slots // ENTERING, 1))
        for asked in list(self._waiting):
            if len(self._running) == most:
                return
            try:
                if not self._ready(asked.adapter, claims):
                    continue
                place = None if asked.adapter is None else self._loaded[asked.adapter]
                asked.number = self._engine.add(dataclasses.replace(asked.request, adapter=place))
            except UserError as error:
                # A path of the server's is nobody's business.
                said = str(error).replace(str(asked.adapter), "its adapter")
                self._fail([asked], Refused(f"This model cannot be served: {said}", param="model", code="not_served"))
            except Exception:  # of one request, such as its adapter's files; the others go on
                log.exception("a request failed")
                self._fail([asked], _failed())
            else:
                self._waiting.remove(asked)
                self._running[asked.number] = asked

    def _ready(self, adapter: Path | None, claims: dict[Path, Path]) -> bool:
        """Whether an adapter is loaded and nobody waits for its place; it is loaded where there is one for it."""
        if adapter is None:
            return True
        if adapter in claims or adapter in claims.values():
            return False
        if adapter not in self._loaded:
            if not self._free:
                used = {asked.adapter for asked in self._running.values()}
                others = [other for other in self._loaded if other not in claims.values()]
                idle = next((other for other in others if other not in used), None)
                if idle is None:
                    claims |= {adapter: others[0]} if others else {}
                    return False
                self._free.append(self._loaded.pop(idle))
            self._engine.set_adapter(self._free[-1], adapted.of_rows(self.base, self._facts, adapter))
            self._loaded[adapter] = self._free.pop()
        self._loaded.move_to_end(adapter)
        return True

    def _step(self) -> None:
        if not self._running:
            return
        try:
            new, ended = self._engine.step(self.limits.dispatch)
        except Exception:
            # Such as a device out of memory. What the engine holds may be gone, so that all that runs is.
            log.exception("the engine failed; it is made anew")
            self._fail(list(self._running.values()), _failed())
            self._failures += 1
            if self._failures == FAILURES:
                raise
            self._begin()
            return
        self._failures = 0
        for number in new.keys() | ended.keys():
            asked, completion = self._running[number], ended.get(number)
            tokens, logps, likeliest = new.get(number, []), [], None
            if asked.logps:
                whole, these = completion or self._engine.written(number), slice(asked.sent, asked.sent + len(tokens))
                logps = whole.full_logps[these].tolist()
                if whole.likeliest is not None:
                    columns = whole.likeliest[these].tolist(), whole.likeliest_logps[these].tolist()
                    likeliest = [list(zip(*both, strict=True)) for both in zip(*columns, strict=True)]
            asked.sent += len(tokens)
            self.tokens += len(tokens)
            if completion is not None:
                self._end(asked)
            asked.writing.put(Part(asked.index, tokens, logps, completion, likeliest))

    def _give_up(self, asked: Sequence[_Asked]) -> None:
        for one in asked:
            if one in self._waiting:
                self._end(one)
            elif one.number in self._running:
                self._engine.cancel(one.number)
                self._end(one)

    def _fail(self, asked: Sequence[_Asked], error: Refused) -> None:
        for one in asked:
            self._end(one)
            one.writing.put(error)

    def _end(self, asked: _Asked) -> None:
        if asked in self._waiting:
            self._waiting.remove(asked)
        self._running.pop(asked.number, None)
        with self._lock:
            self._open -= 1


def _on_mesh(variables: Tree) -> contextlib.AbstractContextManager:
    """What an engine over these variables is used under."""
    placed = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    return jax.set_mesh(placed.mesh) if isinstance(placed, NamedSharding) else contextlib.nullcontext()


def _dead() -> Refused:
    return Refused("The server writes no completions any more; it is to be restarted.", code="stopped", status=503)


def _failed() -> Refused:
    return Refused("The server failed at this completion; its log says why.", code="failed", status=500)
