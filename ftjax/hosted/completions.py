"""/v1/completions: text that the model goes on from, as OpenAI's client asks for it."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from ftjax.data.format.conversation import check_string
from ftjax.hosted.asking import Asked, Events, answered, floor, read, read_whole, usage
from ftjax.hosted.generation import Generation, Part, Writing
from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Models
from ftjax.hosted.wording import Text, Token, ending
from ftjax.sampling.request import Completion

LENGTH = 16  # tokens of a completion, where none are asked for: OpenAI's
PROMPTS = 128  # of one call, at most

Id = Annotated[int, Field(ge=0, lt=2**31)]


class Plain(Asked):
    prompt: str | list[str] | list[Id] | list[list[Id]] | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise Refused(
                "best_of is not supported here but as n; leave it out.", param="best_of", code="unsupported_parameter"
            )
        if self.suffix:
            raise Refused("suffix is not supported here; leave it out.", param="suffix", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise Refused(
                "echo with logprobs is not supported here, as prompts have none; leave one of them out.",
                param="echo",
                code="unsupported_parameter",
            )

    @property
    def prompts(self) -> list[str | list[int]]:
        given = self.prompt
        if given is None or len(given) == 0:
            raise Refused("prompt is empty; give a text, token ids, or a list of these.", param="prompt")
        several = not isinstance(given, str) and not isinstance(given[0], int)
        if several and len(given) > PROMPTS:
            raise Refused(f"prompt has {len(given)} prompts; use up to {PROMPTS}.", param="prompt")
        return given if several else [given]


def routes(generation: Generation, models: Models) -> APIRouter:
    """What is under /v1/completions.

    models: what a model's name stands for.
    """
    router, tokenizer, vocabulary = APIRouter(), generation.base.tokenizer, generation.base.model.spec.vocab_size

    def encoded(prompts: list[str | list[int]]) -> list[np.ndarray]:
        out = []
        for prompt in prompts:
            if isinstance(prompt, str):
                generation.check_length(prompt, param="prompt")
                read("prompt", lambda: check_string(prompt, "prompt"))  # noqa: B023
                with generation.encoding:
                    prompt = tokenizer.encode(prompt)
            if not prompt:
                raise Refused("prompt is empty; give a text or token ids.", param="prompt")
            if max(prompt) >= vocabulary:
                raise Refused(
                    f"prompt has the token {max(prompt)}; the model's are 0 to {vocabulary - 1}.", param="prompt"
                )
            out.append(np.asarray(prompt, np.int32))
        return out

    @router.post("/v1/completions")
    async def create(body: Plain, request: Request) -> Response:
        body.check()
        served = await run_in_threadpool(models.find, body.model, request.state.owner)
        prompts = await run_in_threadpool(encoded, body.prompts)
        rooms = [generation.room(len(ids), body.max_tokens, "prompt") for ids in prompts]
        rooms = [min(room, body.max_tokens or LENGTH) for room in rooms]
        asked = body.requests(generation, prompts, rooms, likeliest=bool(body.logprobs))
        writing = generation.ask(asked, served.adapter, body.logprobs is not None)
        echoes = [text for text in _echoes(body, tokenizer) for _ in range(body.n or 1)]
        answers = [Answer(generation, body, echo) for echo in echoes]
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        head |= {"model": served.name, "system_fingerprint": generation.fingerprint}
        count = sum(map(len, prompts))
        if body.stream:
            return Events(writing, _chunks(writing, answers, head, body, count))
        return await answered(request, writing, _whole(writing, answers, head, count))

    return router


def _echoes(body: Plain, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What each completion begins with."""
    if not body.echo:
        return [""] * len(body.prompts)
    return [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompts]


class Answer:
    """One choice on its way to a client: `add` and `finish` return the next part of its text."""

    def __init__(self, generation: Generation, body: Plain, echo: str):
        self._text, self._logprobs = Text(generation.base.tokenizer, body.stops), body.logprobs is not None
        self._bytes_of, self._top, self.echo = generation.bytes_of, body.logprobs or 0, echo
        self.reason: str | None = None
        self.count = 0

    @property
    def text(self) -> str:
        return self.echo + self._text.text

    def add(self, part: Part) -> str:
        return self._text.add(part.tokens, part.logps, part.likeliest)

    def finish(self, completion: Completion) -> str:
        self.count, self.reason = len(completion.logps), ending(completion)
        return self._text.finish()

    def logprobs(self) -> dict | None:
        """Those that have not been given yet; offsets are of the completion's text."""
        if not self._logprobs:
            return None
        tokens = self._text.take(len(self._text.text) if self.reason is None else None)
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [floor(token.logp) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens] if self._top else None,
            "text_offset": [token.start for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """With the token itself; of parts of characters, which have one name, the likeliest."""
        both = [(token.id, token.logp), *reversed(token.likeliest[: self._top])]
        return {self._name(id): floor(logp) for id, logp in both}

    def _name(self, token: int) -> str:
        return self._bytes_of(token).decode(errors="replace")


async def _whole(writing: Writing, answers: list[Answer], head: dict, prompts: int) -> dict:
    await read_whole(writing, answers)
    choices = []
    for index, answer in enumerate(answers):
        said = {"text": answer.text, "logprobs": answer.logprobs(), "finish_reason": answer.reason}
        choices.append({"index": index, **said})
    return {**head, "choices": choices, "usage": usage(prompts, sum(answer.count for answer in answers))}


async def _chunks(
    writing: Writing, answers: list[Answer], head: dict, body: Plain, prompts: int
) -> AsyncIterator[dict]:
    rest = {"usage": None} if body.include_usage else {}

    def chunk(index: int, text: str) -> dict:
        answer = answers[index]
        choice = {"index": index, "text": text, "logprobs": answer.logprobs(), "finish_reason": answer.reason}
        return {**head, "choices": [choice], **rest}

    for index, answer in enumerate(answers):
        if answer.echo:
            yield chunk(index, answer.echo)
    async for part in writing:
        answer = answers[part.request]
        text = answer.add(part)
        if part.completion is not None:
            text += answer.finish(part.completion)
        if text or answer.reason:
            yield chunk(part.request, text)
    if body.include_usage:
        yield {**head, "choices": [], "usage": usage(prompts, sum(answer.count for answer in answers))}
