"""Models that are asked: the probability of (A) against float64 and an endpoint's; turns, seeds, cuts."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.endpoints import serving
from support.tiny import batch_of, logits, numpy_params, one_device, spec

from ftjax.constitutional import models, requests
from ftjax.data.tokens.chat import render_prompt
from ftjax.errors import UserError
from ftjax.models.decoder import Decoder
from ftjax.sampling.sampler import Sampling

ASKED = [{"role": "user", "content": "(A) one (B) two Which? "}]
LONGER = [*ASKED, {"role": "assistant", "content": "(B)"}, {"role": "user", "content": "And now?"}]
MODEL = Decoder(spec(vocab_size=400, max_position_embeddings=256))


@pytest.fixture(scope="module")
def variables():
    return {"params": jax.device_put(numpy_params(MODEL), jax.sharding.NamedSharding(one_device(), jax.P()))}


def asked_model(variables, tokenizer, ends=()):
    base = SimpleNamespace(tokenizer=tokenizer, model=MODEL, source="tiny", end_tokens=list(ends))
    return models.local(base, variables, 8)


def test_the_probability_of_a_is_that_of_the_models_logits_in_float64(variables):
    tokenizer = make_tokenizer(CHATML)
    found = asked_model(variables, tokenizer).choose([ASKED, LONGER])
    expected = []
    for messages in (ASKED, LONGER):
        totals = []
        for letter in ("(A)", "(B)"):
            context, answer = render_prompt(messages, tokenizer), tokenizer.encode(letter, add_special_tokens=False)
            tokens = np.array([*context, *answer], np.int32)
            batch = batch_of([[(tokens, np.ones(len(tokens), bool))]], 128)
            of = logits(MODEL, variables, batch)[0].astype(np.float64)
            normal = of - np.log(np.exp(of).sum(-1, keepdims=True))
            totals.append(sum(normal[len(context) + i - 1, token] for i, token in enumerate(answer)))
        expected.append(np.exp(totals[0]) / (np.exp(totals[0]) + np.exp(totals[1])))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == np.float64
    assert abs(found - 0.5).max() > 1e-3


def test_normalizing_is_stable():
    a, b = np.array([-1.0, -900.0, -3.0, 0.0]), np.array([-2.0, -901.0, -3.0, -2000.0])
    np.testing.assert_allclose(models.normalized(a, b), [1 / (1 + math.exp(-1))] * 2 + [0.5, 1.0], rtol=1e-15)


def test_what_is_written_follows_from_the_number_of_the_row_and_not_from_its_neighbors(variables):
    model = asked_model(variables, make_tokenizer(CHATML))
    together = model.write([ASKED, LONGER, ASKED], 6, Sampling(1.0, seed=3), 10)
    assert model.write([LONGER, ASKED], 6, Sampling(1.0, seed=3), 11) == together[1:]
    assert together[0] != together[2]
    assert not together[0].ended
    with pytest.raises(UserError, match=r"a request has \d+ tokens and its answer may have 250.*lower --shots"):
        model.write([ASKED], 250, Sampling(), 0)


def test_a_model_without_a_template_goes_on_from_a_transcript_up_to_the_next_turn():
    assert requests.transcript(LONGER) == (
        "Human: (A) one (B) two Which? \n\nAssistant: (B)\n\nHuman: And now?\n\nAssistant:"
    )
    assert models._within_turn(models.Text(" Yes.\n\nHuman: Why?", False)) == models.Text("Yes.", True)
    assert models._within_turn(models.Text(" Yes.", False)) == models.Text("Yes.", False)


def likely(**probabilities):
    return [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]


def test_an_endpoint_writes_and_tells_probabilities(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    places = [{"top_logprobs": likely(**{"(": 0.9, "The": 0.1})}]
    places.append({"top_logprobs": likely(**{"A": 0.2, " A": 0.1, "B": 0.5, "C": 0.1})})

    def reply(body):
        if not body.get("logprobs"):
            return {"message": {"content": f"to {body['messages'][-1]['content']}"}, "finish_reason": "length"}
        return {"message": {"content": "(B)"}, "logprobs": {"content": places}}

    with serving(reply) as server:
        critic = models.endpoint(server.url, "judge-1", key="")
        assert critic.write([LONGER], 7, Sampling(0.5), 0) == [models.Text("to And now?", False)]
        np.testing.assert_allclose(critic.choose([ASKED, LONGER]), [0.3 / 0.8] * 2, rtol=1e-12)
        written, chosen, _ = server.asked
        assert written == {"model": "judge-1", "messages": LONGER, "temperature": 0.5, "max_tokens": 7}
        assert (chosen["logprobs"], chosen["top_logprobs"], chosen["temperature"]) == (True, 20, 0)
        places.pop()
        with pytest.raises(UserError, match=r"neither A nor B is likely in the reply '\(B\)'; it was asked"):
            critic.choose([ASKED])
        places.pop()
        with pytest.raises(UserError, match="gives no log-probabilities"):
            critic.choose([ASKED])
