"""/v1/chat/completions as OpenAI's own client asks for them, of a small random model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from support.chatting import Names, application, client, random_adapter, serving, tiny
from support.tiny import batch_of, logits

from ftjax.adapted import facts_of, of_rows
from ftjax.data.tokens.chat import render_prompt
from ftjax.hosted import chat
from ftjax.hosted.generation import Generation, Limits
from ftjax.sampling import engine
from ftjax.sampling.sampler import Sampling

ASKED = [{"role": "user", "content": "Where is my order?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base, variables = tiny(root)
    adapters = {f"ft:{name}": random_adapter(base, root / name, seed) for seed, name in enumerate("abc")}
    made = Generation(base, variables, Limits(slots=8, places=2, rank=4))
    made.folders = adapters
    with serving(application(chat.routes(made, Names("tiny", adapters)))) as url, client(url) as asks:
        yield base, variables, made, asks
    made.close()


def expected(base, variables, messages, count, sampling=None, number=0):
    prompt = render_prompt(messages, base.tokenizer)
    (made,) = engine.generate(
        base.model, variables, [prompt], count, base.end_tokens, sampling or Sampling(), numbers=[number]
    )
    return made, base.tokenizer.decode(made.tokens, skip_special_tokens=True), len(prompt)


def test_a_greedy_answer_is_the_engine_s(served):
    base, variables, _, asks = served
    made, text, prompt = expected(base, variables, ASKED, 24)
    said = asks.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=24, logprobs=True)
    assert said.choices[0].message.content == text
    assert said.choices[0].finish_reason == ("stop" if made.stopped else "length")
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (prompt, len(made.logps))
    given = said.choices[0].logprobs.content
    np.testing.assert_allclose([one.logprob for one in given], made.full_logps[: len(given)], rtol=1e-4, atol=1e-5)
    assert b"".join(bytes(one.bytes or []) for one in given).decode(errors="replace") == text
    assert said.system_fingerprint.startswith("fp_")


def test_what_no_context_holds_is_refused_before_it_is_encoded(served, monkeypatch):
    *_, asks = served
    monkeypatch.setattr(chat, "render_prompt", None)
    long = [*ASKED, {"role": "user", "content": [{"type": "text", "text": "order " * 500_000}]}]
    with pytest.raises(openai.BadRequestError, match="the 3,000,030 characters of your messages are more") as error:
        asks.chat.completions.create(model="tiny", messages=long)
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")
    monkeypatch.undo()
    with pytest.raises(openai.BadRequestError, match="stop: a text to stop at has 1,000,000"):
        asks.chat.completions.create(model="tiny", messages=ASKED, stop="ab" * 500_000)


def test_a_draw_with_a_seed_is_the_engine_s_whatever_is_beside_it(served):
    base, variables, _, asks = served
    how = {"model": "tiny", "messages": ASKED, "seed": 7, "temperature": 0.9, "top_p": 0.8, "max_tokens": 20}
    alone = asks.chat.completions.create(**how, n=3)
    assert [choice.index for choice in alone.choices] == [0, 1, 2]
    for choice in alone.choices:
        sampling = Sampling(0.9, top_p=0.8, seed=7)
        _, text, _ = expected(base, variables, ASKED, 20, sampling, choice.index)
        assert choice.message.content == text
    others = [{"role": "user", "content": f"The lamp {number}"} for number in range(6)]
    with ThreadPoolExecutor(8) as pool:
        beside = [pool.submit(asks.chat.completions.create, **(how | {"messages": [other]})) for other in others]
        again = pool.submit(asks.chat.completions.create, **how, n=2).result()
        assert len({one.result().choices[0].message.content for one in beside}) > 1
    assert [one.message.content for one in again.choices] == [one.message.content for one in alone.choices[:2]]
    assert len({one.message.content for one in alone.choices}) == 3
    unseeded = {
        asks.chat.completions.create(model="tiny", messages=ASKED, max_tokens=9).choices[0].message.content
        for _ in range(3)
    }
    assert len(unseeded) > 1


def streamed(chunks):
    """{choice: (text, reasons, logprobs)}, and the usage of the last chunk."""
    texts, reasons, logprobs, usage = {}, {}, {}, None
    for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index in texts or choice.delta.role == "assistant"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons.setdefault(choice.index, []).append(choice.finish_reason)
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
    return texts, reasons, logprobs, usage


def test_a_stream_is_the_whole_answer_in_parts(served):
    *_, asks = served
    how = {"model": "tiny", "messages": ASKED, "seed": 5, "n": 2, "max_tokens": 30, "logprobs": True}
    whole = asks.chat.completions.create(**how)
    stream = asks.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts, reasons, logprobs, usage = streamed(chunks)
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index][-1] == choice.finish_reason
        assert set(reasons[choice.index][:-1]) == {None}
        assert [one.token for one in logprobs[choice.index]] == [one.token for one in choice.logprobs.content]
    assert len(chunks) > 6  # of 8 tokens each
    assert len({chunk.id for chunk in chunks}) == 1
    with asks.chat.completions.stream(model="tiny", messages=ASKED, seed=5, max_tokens=30) as events:  # the helper
        assert "".join(event.delta for event in events if event.type == "content.delta") == texts[0]


def test_the_likeliest_tokens_in_the_place_of_each_are_the_model_s(served):
    base, variables, generation, asks = served
    how = {"model": "tiny", "messages": ASKED, "seed": 5, "max_tokens": 10, "logprobs": True, "top_logprobs": 4}
    given = asks.chat.completions.create(**how).choices[0].logprobs.content
    made, _, prompt = expected(base, variables, ASKED, 10, Sampling(1.0, seed=5))
    whole = np.concatenate([render_prompt(ASKED, base.tokenizer), made.tokens])
    batch = batch_of([[(whole, np.ones(len(whole), bool))]], len(whole))
    said = logits(base.model, variables, batch)[0].astype(np.float64)
    for place, one in enumerate(given):
        row = said[prompt - 1 + place] - np.log(np.exp(said[prompt - 1 + place]).sum())
        best = np.argsort(-row)[:4]
        assert [bytes(other.bytes or []) for other in one.top_logprobs if other.bytes] == [
            generation.bytes_of(token) for token in best if token not in base.tokenizer.all_special_ids
        ]
        np.testing.assert_allclose([other.logprob for other in one.top_logprobs], row[best], rtol=1e-4, atol=1e-5)
    stream = streamed(asks.chat.completions.create(**how, stream=True))
    assert [one.top_logprobs for one in stream[2][0]] == [one.top_logprobs for one in given]


def test_stop_strings_end_an_answer_and_are_not_in_it(served):
    base, variables, _, asks = served
    made, text, _ = expected(base, variables, ASKED, 24)
    for stop in (text[3:5], [text[6:7], "never"]):
        how = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_tokens": 24, "stop": stop}
        said = asks.chat.completions.create(**how, logprobs=True)
        first = stop if isinstance(stop, str) else stop[0]
        assert said.choices[0].message.content == text[: text.index(first)]
        assert said.choices[0].finish_reason == "stop"
        assert said.usage.completion_tokens < len(made.logps)
        assert "".join(one.token for one in said.choices[0].logprobs.content).startswith(
            said.choices[0].message.content
        )
        texts, *_ = streamed(asks.chat.completions.create(**how, stream=True))
        assert texts[0] == said.choices[0].message.content


def test_biased_tokens(served):
    base, variables, generation, asks = served
    (token,) = base.tokenizer.encode(" lamp", add_special_tokens=False)
    how = {"model": "tiny", "messages": ASKED, "max_tokens": 4, "temperature": 0}
    assert asks.chat.completions.create(**how, logit_bias={str(token): 100}).choices[0].message.content == " lamp" * 4
    made, *_ = expected(base, variables, ASKED, 4)
    other = asks.chat.completions.create(**how, logit_bias={str(made.tokens[0]): -100}, logprobs=True)
    assert bytes(other.choices[0].logprobs.content[0].bytes or []) != generation.bytes_of(made.tokens[0])


def test_each_of_many_adapters_in_a_batch_answers_as_it_does_alone(served):
    base, variables, made, asks = served
    names = [None, "ft:a", "ft:b", "ft:c"]  # of which two have a place at a time
    prompts = [[{"role": "user", "content": f"Where is lamp {number}?"}] for number in range(6)]

    def ask(name, messages):
        said = asks.chat.completions.create(model=name or "tiny", messages=messages, temperature=0, max_tokens=12)
        return said.choices[0].message.content

    with ThreadPoolExecutor(24) as pool:
        asked = {
            (name, number): pool.submit(ask, name, messages)
            for name in names
            for number, messages in enumerate(prompts)
        }
        said = {key: one.result() for key, one in asked.items()}
    for name in names:
        own = variables | {"lora": of_rows(base, facts_of(base), made.folders[name])} if name else variables
        for number, messages in enumerate(prompts):
            assert said[name, number] == expected(base, own, messages, 12)[1]
    assert len(set(said.values())) > 12
    assert made.open == made.running == 0
