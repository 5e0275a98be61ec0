"""/v1/completions as OpenAI's client asks for them."""

import numpy as np
import openai
import pytest
from support.chatting import Names, application, client, serving, tiny

from ftjax.hosted import completions
from ftjax.hosted.generation import Generation, Limits
from ftjax.sampling import engine
from ftjax.sampling.sampler import Sampling

TEXTS = ["The blue lamp", "Where is", "Anna and the order of Monday"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    base, variables = tiny(tmp_path_factory.mktemp("plain"))
    made = Generation(base, variables, Limits(slots=4, places=1, rank=1))
    with serving(application(completions.routes(made, Names("tiny", {})))) as url, client(url) as asks:
        yield base, variables, asks
    made.close()


def expected(base, variables, texts, count):
    prompts = [np.array(base.tokenizer.encode(text), np.int32) for text in texts]
    made = engine.generate(base.model, variables, prompts, count, base.end_tokens, Sampling())
    return prompts, made, [base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in made]


def test_texts_and_tokens_are_gone_on_from(served):
    base, variables, asks = served
    prompts, made, texts = expected(base, variables, TEXTS, 12)
    ids = [prompt.tolist() for prompt in prompts]
    for given, which in ((TEXTS[0], [0]), (TEXTS, [0, 1, 2]), (ids[1], [1]), (ids, [0, 1, 2])):
        said = asks.completions.create(model="tiny", prompt=given, temperature=0, max_tokens=12)
        assert [choice.text for choice in said.choices] == [texts[i] for i in which]
        assert [choice.index for choice in said.choices] == list(range(len(which)))
        assert said.usage.prompt_tokens == sum(len(ids[i]) for i in which)
        assert said.usage.completion_tokens == sum(len(made[i].logps) for i in which)
        assert said.object == "text_completion"
    assert asks.completions.create(model="tiny", prompt="a", seed=2).usage.completion_tokens <= 16


def test_several_of_each_with_log_probabilities(served):
    base, variables, asks = served
    _, made, texts = expected(base, variables, TEXTS[:2], 10)
    how = {"model": "tiny", "prompt": TEXTS[:2], "temperature": 0, "max_tokens": 10, "n": 2, "logprobs": 0}
    said = asks.completions.create(**how)
    assert [choice.text for choice in said.choices] == [texts[0], texts[0], texts[1], texts[1]]
    for choice in said.choices:
        given, whole = choice.logprobs, made[choice.index // 2]
        np.testing.assert_allclose(given.token_logprobs, whole.full_logps[: len(whole.tokens)], rtol=1e-4, atol=1e-5)
        assert given.text_offset[0] == 0
        assert len(given.tokens) == len(given.text_offset) == len(whole.tokens)
        assert given.text_offset == sorted(given.text_offset)


def test_the_likeliest_in_the_place_of_each(served):
    *_, asks = served
    how = {"model": "tiny", "prompt": TEXTS[0], "seed": 3, "max_tokens": 6, "logprobs": 3}
    given = asks.completions.create(**how).choices[0].logprobs
    assert len(given.top_logprobs) == len(given.tokens) == 6
    for token, logp, others in zip(given.tokens, given.token_logprobs, given.top_logprobs):
        assert others[token] >= logp
        assert 1 <= len(others) <= 4
        assert max(others.values()) < 0


def test_a_stream_and_an_echo(served):
    *_, asks = served
    how = {"model": "tiny", "prompt": TEXTS, "seed": 4, "max_tokens": 20, "logprobs": 0, "stop": ["e"]}
    whole = asks.completions.create(**how)
    texts, offsets, reasons = [""] * 3, [[], [], []], [None] * 3
    chunks = list(asks.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert "e" not in choice.text
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert reasons[choice.index] == choice.finish_reason
    del how["logprobs"]
    for stream in (False, True):
        echoed = asks.completions.create(**how, echo=True, stream=stream)
        said = [""] * 3
        for chunk in echoed if stream else [echoed]:
            for choice in chunk.choices:
                said[choice.index] += choice.text
        assert said == [given + choice.text for given, choice in zip(TEXTS, whole.choices)]


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"suffix": "."}, "suffix", "is not supported here"),
        ({"best_of": 3}, "best_of", "is not supported here"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": 0, "echo": True}, "echo", "leave one of them out"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": [[]]}, "prompt", "is empty"),
        ({"prompt": [400]}, "prompt", "the token 400; the model's are 0 to 399"),
        ({"prompt": "long " * 500}, "prompt", "maximum context length is 512 tokens"),
        ({"max_tokens": 511}, "prompt", r"you requested \d+ tokens"),
        ({"n": 99, "prompt": ["a"] * 9}, "n", "ask for up to 260 at once"),
    ],
)
def test_what_is_refused(served, changes, param, said):
    *_, asks = served
    with pytest.raises(openai.BadRequestError, match=said) as error:
        asks.completions.create(**({"model": "tiny", "prompt": "The lamp"} | changes))
    assert error.value.param == param
