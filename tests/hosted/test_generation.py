"""The thread that writes: streams of many clients, those that go away, adapters that wait, and failures."""

import asyncio
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from support.chatting import Names, application, client, random_adapter, serving, tiny

from ftjax.errors import UserError
from ftjax.hosted import chat, generation
from ftjax.hosted.generation import Generation, Limits
from ftjax.hosted.refusals import Refused
from ftjax.sampling.request import Request
from ftjax.sampling.sampler import Sampling

ASKED = [{"role": "user", "content": "Where is my order?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("writing")
    base, variables = tiny(root)
    return base, variables, [random_adapter(base, root / f"adapter_{seed}", seed) for seed in range(4)]


@pytest.fixture
def make(model):
    """Makes a Generation of the model, which is closed in the end."""
    made = []

    def make(**limits):
        made.append(Generation(*model[:2], Limits(**({"slots": 4, "places": 2, "rank": 4} | limits))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def request(count=20, seed=0, **more):
    return Request(np.array([5, 6, 7], np.int32), count, Sampling(1.0, seed=seed), **more)


async def read(writing):
    tokens, ended = {}, {}
    async for part in writing:
        tokens.setdefault(part.request, []).extend(part.tokens)
        if part.completion is not None:
            ended[part.request] = part.completion
    assert {number: one.tokens.tolist() for number, one in ended.items()} == tokens
    return tokens


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_64_streams_with_some_that_go_away(model, make):
    made = make(slots=16, waiting=100)
    names = Names("tiny", {f"ft:{i}": path for i, path in enumerate(model[2])})

    async def ask(asks, number):
        """The text; None of one that goes away after two chunks, or before the first."""
        name = ["tiny", "ft:0", "ft:1", "ft:2", "ft:3"][number % 5]
        how = {"model": name, "messages": ASKED, "seed": number, "max_tokens": 24, "stream": True}
        if number % 7 == 3:
            with pytest.raises(openai.APITimeoutError):
                await asks.with_options(timeout=0.001).chat.completions.create(**how)
            return None
        chunks, text = 0, ""
        async with await asks.chat.completions.create(
            **(how | {"max_tokens": 400 if number % 7 == 5 else 24})
        ) as stream:
            async for chunk in stream:
                chunks += 1
                text += chunk.choices[0].delta.content or ""
                if number % 7 == 5 and chunks == 2:
                    return None
        return text

    async def all_of(url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300) as asks:
            return await asyncio.gather(*(ask(asks, number) for number in range(64)))

    with serving(application(chat.routes(made, names))) as url:
        texts = asyncio.run(all_of(url))
        until(lambda: made.open == 0)
        with client(url) as asks:  # what was said in the crowd is what is said alone
            for number in (0, 1, 2, 6, 63):
                how = {"model": ["tiny", "ft:0", "ft:1", "ft:2", "ft:3"][number % 5], "messages": ASKED, "seed": number}
                said = asks.chat.completions.create(**how, max_tokens=24)
                assert said.choices[0].message.content == texts[number]
    assert sum(text is None for text in texts) == 18
    assert made.running == 0
    assert not made._engine.busy


def test_who_waits_for_a_whole_answer_and_goes_away_is_given_up(make):
    made = make()
    with serving(application(chat.routes(made, Names("tiny", {})))) as url:
        body = {"model": "tiny", "messages": ASKED, "n": 8, "logit_bias": {"2": -100, "4": -100}}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
        until(lambda: made.open == 0)
        assert made.tokens < 8 * 400


def test_more_than_may_wait_are_turned_away_and_told_so(make):
    made = make(slots=2, waiting=2)

    async def main():
        first = made.ask([request(200, seed) for seed in range(3)], None)
        with pytest.raises(Refused, match="3 completions are being written or wait, of at most 4") as error:
            made.ask([request(), request()], None)
        assert (error.value.status, error.value.headers) == (503, {"retry-after": "1"})
        with pytest.raises(Refused, match="ask for up to 4 at once") as error:
            made.ask([request()] * 5, None)
        assert error.value.status == 400
        first.close()
        while made.open:
            await asyncio.sleep(0.01)
        assert len(await read(made.ask([request()] * 4, None))) == 4

    asyncio.run(main())


def test_nobody_waits_for_ever_for_a_place(model, make):
    """Requests of two adapters come without end; one of a third is answered all the same, and the others stay right."""
    made, adapters = make(slots=4, places=2), model[2]

    async def main():
        alone = [await read(made.ask([request(30)], path)) for path in adapters[:3]]
        assert len({str(one) for one in alone}) == 3
        done = asyncio.Event()

        async def often(path, wanted):
            while not done.is_set():
                assert await read(made.ask([request(30)], path)) == wanted

        crowd = [asyncio.create_task(often(adapters[i % 2], alone[i % 2])) for i in range(6)]
        await asyncio.sleep(0.2)
        third = [await asyncio.wait_for(read(made.ask([request(30)], adapters[2])), 60) for _ in range(3)]
        done.set()
        await asyncio.gather(*crowd)
        assert third == [alone[2]] * 3

    asyncio.run(main())


def test_an_adapter_that_cannot_be_served_fails_alone_and_its_path_is_not_told(model, make, tmp_path):
    base, _, adapters = model
    made, large = make(), random_adapter(base, tmp_path / "large", 9, rank=8)

    async def main():
        for path, said in ((large, "rank 8"), (tmp_path / "absent", "its adapter")):
            with pytest.raises(Refused, match=f"This model cannot be served: .*{said}") as error:
                await read(made.ask([request()], path))
            assert str(tmp_path) not in str(error.value)
            assert error.value.code == "not_served"
        for path in (*adapters, None):
            assert await read(made.ask([request()], path))

    asyncio.run(main())
    assert made.alive
    assert made.open == 0


def test_a_failing_engine_is_made_anew_and_one_that_fails_again_and_again_ends_the_thread(make, monkeypatch, caplog):
    made, failing = make(), threading.Event()
    step = generation.Engine.step

    def sometimes(engine, limit):
        if failing.is_set():
            raise RuntimeError("out of memory")
        return step(engine, limit)

    monkeypatch.setattr(generation.Engine, "step", sometimes)

    async def main():
        good = await read(made.ask([request()], None))
        for _ in range(2):
            failing.set()
            with pytest.raises(Refused, match="its log says why") as error:
                await read(made.ask([request()], None))
            assert error.value.status == 500
            until(lambda: made.open == 0)
        failing.clear()
        assert await read(made.ask([request()], None)) == good
        failing.set()
        for _ in range(generation.FAILURES):
            with pytest.raises(Refused, match="its log says why"):
                await read(made.ask([request()], None))
        until(lambda: not made.alive)
        with pytest.raises(Refused, match="writes no completions any more") as error:
            made.ask([request()], None)
        assert error.value.status == 503

    asyncio.run(main())
    assert "out of memory" in caplog.text


def test_limits_are_numbers_that_do_something():
    with pytest.raises(UserError, match="slots=0: use a whole number, 1 or more"):
        Limits(slots=0)
    assert Limits(waiting=0).waiting == 0


def test_an_end_of_the_server_is_told_to_those_who_wait(model):
    made = Generation(*model[:2], Limits(slots=1, places=1, rank=4))

    async def main():
        writing = [made.ask([request(400)], None) for _ in range(3)]
        await asyncio.sleep(0.1)
        closing = threading.Thread(target=made.close)
        closing.start()
        for one in writing:
            with pytest.raises(Refused, match="no completions any more"):
                await read(one)
        closing.join()

    asyncio.run(main())
    assert not made.alive
    assert made.open == 0
