"""/v1/chat/completions as OpenAI's own client asks for them, of a small random model."""

import numpy as np
import openai
import pytest
from support.hosted import Names, application, client, random_adapter, serving, tiny

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
    with serving(application(chat.routes(made, Names("tiny", adapters)))) as url:
        yield base, variables, made, client(url)
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
    assert b"".join(bytes(one.bytes) for one in given).decode(errors="replace") == text
    assert said.system_fingerprint.startswith("fp_")
