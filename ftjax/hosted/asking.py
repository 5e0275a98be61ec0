"""What chat and plain completions share: how a request says what is to be written, and how an answer goes back."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ftjax.errors import UserError
from ftjax.hosted.generation import BIASES, Generation, Part, Writing
from ftjax.hosted.refusals import Refused
from ftjax.sampling import request as engine
from ftjax.sampling import stop_strings
from ftjax.sampling.request import Completion
from ftjax.sampling.sampler import Sampling

Number = Annotated[float, Field(allow_inf_nan=False)]
Made = TypeVar("Made")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: bool | None = None  # of sizes, against who watches a network; nothing here does it


class Asked(BaseModel):
    """The fields that both have, as OpenAI names them; null is as good as left out.

    harmless: further fields that change nothing of an answer, and their values that do not.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    harmless: ClassVar[Mapping[str, Callable[[Any], bool]]] = {"user": lambda value: isinstance(value, str)}

    model: Annotated[str, Field(min_length=1, max_length=512)]
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Refused for what is not served here, by its name."""
        for name, value in (self.model_extra or {}).items():
            known = self.harmless.get(name)
            if value is None or (known is not None and known(value)):
                continue
            what = f"{name} is not supported here" if known is None else f"{name}={value!r} is not supported here"
            raise Refused(f"{what}; leave it out.", param=name, code="unsupported_parameter")
        for name in ("frequency_penalty", "presence_penalty"):
            if getattr(self, name):
                raise Refused(
                    f"{name} is not supported here; leave it out, or set it to 0.",
                    param=name,
                    code="unsupported_parameter",
                )
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options is for stream=true alone; leave it out.", param="stream_options")
        if len(self.stops) > 4:
            raise Refused(f"stop has {len(self.stops)} strings; use up to 4.", param="stop")

    def requests(
        self,
        generation: Generation,
        prompts: Sequence[Any],
        rooms: Sequence[int],
        allows: Callable[[], engine.Allows] | None = None,
        likeliest: bool = False,
    ) -> list[engine.Request]:
        """`n` of each prompt, whose draws differ; prompts int32 [length] each, rooms: the most tokens of each.

        allows: makes what Request.allows is, for each of them. likeliest: see Request.
        """
        base, vocabulary = generation.base, generation.base.model.spec.vocab_size
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        # A nucleus of nothing is the likeliest token.
        sampling = Sampling(temperature, top_p=top_p, seed=seed) if top_p and temperature else Sampling(seed=seed)
        stops_at = read("stop", lambda: stop_strings.stops_at(self.stops, base.tokenizer, "stop"))
        bias = _bias(self.logit_bias or {}, vocabulary)
        out = []
        for prompt, room in zip(prompts, rooms, strict=True):
            for _ in range(self.n or 1):
                own = allows() if allows else None
                how = prompt, room, sampling, base.end_tokens, len(out), bias, stops_at
                out.append(engine.Request(*how, allows=own, likeliest=likeliest))
        return out


def _bias(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    if len(given) > BIASES:
        raise Refused(f"logit_bias has {len(given)} tokens; use up to {BIASES}.", param="logit_bias")
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocabulary):
            raise Refused(
                f"logit_bias has the key {key!r}; use token ids, from 0 to {vocabulary - 1}.", param="logit_bias"
            )
        if not -100 <= value <= 100:
            raise Refused(f"logit_bias of {key} is {value}; use -100 to 100.", param="logit_bias")
    return {int(key): float(value) for key, value in given.items()}


def read(param: str, how: Callable[[], Made]) -> Made:
    """What `how` returns; its UserError is the refusal of a parameter."""
    try:
        return how()
    except UserError as error:
        raise Refused(str(error), param=param) from error


def floor(logp: float) -> float:
    """As JSON has it: OpenAI's least one where it is infinite."""
    return max(logp, -9999.0)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def answered(request: Request, writing: Writing, whole: Awaitable[dict]) -> Response:
    """The JSON of `whole`, which reads `writing`; where the client goes away, nothing is written any more."""
    reading, gone = asyncio.ensure_future(whole), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((reading, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(reading.result()) if reading.done() else Response(status_code=499)
    finally:
        writing.close()
        for task in (reading, gone):
            task.cancel()


class Answer(Protocol):
    """What becomes of one request; what is returned is for streams."""

    def add(self, part: Part) -> Any: ...
    def finish(self, completion: Completion) -> Any: ...


async def read_whole(writing: Writing, answers: Sequence[Answer]) -> None:
    """Adds all parts of a call to the answers to its requests, which are then finished."""
    async for part in writing:
        answers[part.request].add(part)
        if part.completion is not None:
            answers[part.request].finish(part.completion)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events of `chunks`, and [DONE]; `writing` is given up where the client goes away."""

    def __init__(self, writing: Writing, chunks: AsyncIterator[dict]):
        super().__init__(_events(chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._writing = writing

    async def __call__(self, *args) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._writing.close()


async def _events(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except Refused as error:  # the status is sent already
        yield _event(error.body())
        return
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
