"""/v1/chat/completions: conversations through the model's own chat template, as OpenAI's client asks for them."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from ftjax import environments
from ftjax.data.format.conversation import tools_of
from ftjax.data.tokens.chat import render_prompt
from ftjax.hosted import schema
from ftjax.hosted.asking import Asked, Events, answered, floor, read, read_whole, usage
from ftjax.hosted.generation import Generation, Part, Writing
from ftjax.hosted.refusals import Refused
from ftjax.hosted.served import Models
from ftjax.hosted.wording import Text, Token, ending, special_tokens
from ftjax.sampling import stop_strings
from ftjax.sampling.request import Completion

TAG = "<tool_call>"  # where a call of environments.tagged begins


class Chat(Asked):
    harmless: ClassVar = {
        "metadata": lambda value: isinstance(value, dict),
        "modalities": lambda value: value == ["text"],
        "parallel_tool_calls": lambda value: value is True,
        "prompt_cache_key": lambda value: isinstance(value, str),
        "prompt_cache_retention": lambda value: isinstance(value, str),
        "safety_identifier": lambda value: isinstance(value, str),
        "service_tier": lambda value: value in ("auto", "default"),
        "store": lambda value: value is False,
        "user": lambda value: isinstance(value, str),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=2048)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None

    @property
    def length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def form(self) -> dict[str, Any]:
        return {"type": "text"} if self.response_format is None else {"type": None} | self.response_format

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs is for logprobs=true alone; leave it out.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise Refused(
                "max_tokens is the older name of max_completion_tokens; give one of them.", param="max_tokens"
            )
        if self.tool_choice not in (None, "none", "auto"):
            raise Refused(
                f"tool_choice={self.tool_choice!r} is not supported here; use 'auto' or 'none'.",
                param="tool_choice",
                code="unsupported_parameter",
            )
        if self.tool_choice == "auto" and not self.tools:
            raise Refused("tool_choice is for requests with tools alone; leave it out.", param="tool_choice")
        if self.tools and self.tool_choice != "none" and self.form["type"] != "text":
            raise Refused(
                "response_format is not supported beside tools here, as a call would not be of it; leave one out.",
                param="response_format",
                code="unsupported_parameter",
            )


def routes(generation: Generation, models: Models) -> APIRouter:
    """What is under /v1/chat.

    models: what a model's name stands for.
    """
    router, tokenizer = APIRouter(), generation.base.tokenizer

    def prompt(body: Chat):
        """int32 [n], and what parses calls of tools."""
        with generation.encoding:
            tools = None
            if body.tools and body.tool_choice != "none":
                tools = read("tools", lambda: tools_of({"tools": body.tools}, "the request"))["tools"]
                _check(tools)
            parse = read("tools", lambda: environments.form_of(tokenizer, tools, "tools")) if tools else None
            return read("messages", lambda: render_prompt(body.messages, tokenizer, tools, "messages")), parse

    @router.post("/v1/chat/completions")
    async def create(body: Chat, request: Request) -> Response:
        body.check()
        served = await run_in_threadpool(models.find, body.model, request.state.owner)
        generation.check_length(body.messages, body.tools, param="messages")
        ids, parse = await run_in_threadpool(prompt, body)
        room = generation.room(len(ids), body.length, "messages")
        allows = await run_in_threadpool(schema.follows, generation, body.form)
        asked = body.requests(generation, [ids], [room], allows, bool(body.top_logprobs))
        writing = generation.ask(asked, served.adapter, bool(body.logprobs))
        answers = [Answer(generation, body, parse) for _ in asked]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}
        head |= {"system_fingerprint": generation.fingerprint}
        if body.stream:
            return Events(writing, _chunks(writing, answers, head, body, len(ids)))
        return await answered(request, writing, _whole(writing, answers, head, len(ids)))

    return router


def _check(tools: list[dict]) -> None:
    """Refused for what OpenAI has besides functions."""
    for tool in tools:
        if tool.get("type") != "function":
            raise Refused(f"tools: of type {tool.get('type')!r}; use 'function'.", param="tools")
        if tool["function"].get("strict"):
            raise Refused(
                f"tools: strict of {tool['function']['name']!r} is not supported here, as calls are what the model "
                "writes; leave it out.",
                param="tools",
                code="unsupported_parameter",
            )


class Answer:
    """One choice on its way to a client: `add` and `finish` return what to send, as the deltas of its message."""

    def __init__(self, generation: Generation, body: Chat, parse: environments.Parse | None):
        self._text = Text(generation.base.tokenizer, body.stops)
        self._parse, self._logprobs, self._top = parse, body.logprobs, body.top_logprobs or 0
        self._bytes_of, self._special = generation.bytes_of, special_tokens(generation.base.tokenizer)
        self._sent = 0  # characters of the text that were sent
        self.calls: list[dict] = []
        self.reason: str | None = None
        self.count = 0  # tokens that were written, with the one that ended it

    @property
    def content(self) -> str | None:
        """Without calls of tools."""
        if not self.calls:
            return self._text.text
        return self._before_calls().rstrip() or None

    def add(self, part: Part) -> str:
        self._text.add(part.tokens, part.logps, part.likeliest)
        return self._send(self._plain())

    def finish(self, completion: Completion) -> str:
        self._text.finish()
        self.count, self.reason = len(completion.logps), ending(completion)
        calls = self._parse(self._text.text) if self._parse else []
        if calls and all(isinstance(call, environments.Call) for call in calls):
            self.calls, self.reason = [_call(call) for call in calls], "tool_calls"
            return ""
        return self._send(self._text.text)

    def logprobs(self) -> dict | None:
        """Those that have not been given yet, of what has been sent."""
        if not self._logprobs:
            return None
        tokens = self._text.take(self._sent if self.reason is None else None)
        return {"content": [self._logprob(token) for token in tokens], "refusal": None}

    def _logprob(self, token: Token) -> dict:
        others = [self._named(*other) for other in token.likeliest[: self._top]]
        return self._named(token.id, token.logp) | {"top_logprobs": others}

    def _named(self, token: int, logp: float) -> dict:
        text = self._bytes_of(token)
        known = None if token in self._special else list(text)
        return {"token": text.decode(errors="replace"), "logprob": floor(logp), "bytes": known}

    def _send(self, text: str) -> str:
        part, self._sent = text[self._sent :], max(self._sent, len(text))
        return part

    def _plain(self) -> str:
        """The part of the text that is no call, whatever follows."""
        text = self._text.text
        if self._parse is environments.bare:
            return "" if text.lstrip()[:1] in ("", "{") else text
        return stop_strings.settled(text, [TAG]).rstrip() if self._parse else text

    def _before_calls(self) -> str:
        return "" if self._parse is environments.bare else stop_strings.before(self._text.text, [TAG])


def _call(call: environments.Call) -> dict:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def _whole(writing: Writing, answers: list[Answer], head: dict, prompt: int) -> dict:
    await read_whole(writing, answers)
    choices = []
    for index, answer in enumerate(answers):
        message = {"role": "assistant", "content": answer.content, "refusal": None, "annotations": []}
        if answer.calls:
            message["tool_calls"] = answer.calls
        said = {"finish_reason": answer.reason, "logprobs": answer.logprobs()}
        choices.append({"index": index, "message": message, **said})
    counts = usage(prompt, sum(answer.count for answer in answers))
    return {**head, "object": "chat.completion", "choices": choices, "usage": counts}


async def _chunks(writing: Writing, answers: list[Answer], head: dict, body: Chat, prompt: int) -> AsyncIterator[dict]:
    head = {**head, "object": "chat.completion.chunk"}
    rest = {"usage": None} if body.include_usage else {}

    def chunk(index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **rest}

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for part in writing:
        index, answer = part.request, answers[part.request]
        text = answer.add(part)
        if part.completion is not None:
            text += answer.finish(part.completion)
        if text:
            yield chunk(index, {"content": text}, answer.logprobs())
        if part.completion is not None:
            if answer.calls:
                calls = [{"index": number, **call} for number, call in enumerate(answer.calls)]
                yield chunk(index, {"tool_calls": calls}, answer.logprobs())
            rest_of = answer.logprobs() or {"content": []}
            yield chunk(index, {}, rest_of if rest_of["content"] else None, answer.reason)
    if body.include_usage:
        counts = usage(prompt, sum(answer.count for answer in answers))
        yield {**head, "choices": [], "usage": counts}
