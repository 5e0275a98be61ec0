"""The engine with layers that carry a state: what it writes is as likely as a forward pass over the whole row says."""

import jax
import numpy as np
import pytest
from support.family_configs import CONFIGS
from support.tiny import batch_of, logits, numpy_params

from ftjax.models.decoder import Decoder
from ftjax.models.families import spec_from_config
from ftjax.sampling import engine
from ftjax.sampling.engine import Engine, Request, conversation
from ftjax.sampling.sampler import Sampling

NEW, LENGTH = 5, 64
MAMBA = ("granitemoehybrid", "falcon_h1", "nemotron_h")
DRAWN = Sampling(temperature=1.0, seed=3)
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["qwen3_5", *(pytest.param(name, marks=pytest.mark.slow) for name in MAMBA)])
def made(request):
    """(model, its variables)"""
    model = Decoder(spec_from_config(CONFIGS[request.param]))
    return model, {"params": numpy_params(model)}


@pytest.fixture
def parts(monkeypatch):
    """(first, how many) of each part that is read on."""
    read, original = [], engine.compiled.read_on
    recorded = lambda *args: read.append((int(args[-2]), int(args[-1]))) or original(*args)  # noqa: E731
    monkeypatch.setattr(engine.compiled, "read_on", recorded)
    return read


def text(length):
    return rng.integers(0, 61, length).astype(np.int32)


def finish(made_, requests):
    numbers, completions = [made_.add(request) for request in requests], {}
    while made_.busy:
        completions |= made_.step()[1]
    return [completions[number] for number in numbers]


def check(made, requests, completions):
    """Every token's log-probability against those of a forward pass without a cache."""
    rows = [np.concatenate([request.prompt, done.tokens]) for request, done in zip(requests, completions, strict=True)]
    found = logits(*made, batch_of([[(row, np.ones(len(row), bool))] for row in rows], LENGTH))
    for row, request, done, its in zip(rows, requests, completions, found):
        assert len(done.tokens)
        places = np.arange(len(request.prompt), len(row))
        expected = np.asarray(jax.nn.log_softmax(its[places - 1]))[np.arange(len(places)), row[places]]
        np.testing.assert_allclose(done.full_logps, expected, rtol=0, atol=2e-5)


def asked(prompts, **how):
    return [Request(prompt, NEW, DRAWN, number=number, **how) for number, prompt in enumerate(prompts)]


def test_prompts_of_all_lengths_and_several_samples_of_one(made):
    """Padded in one batch, of one token, more of them than slots, so that a slot has been another's."""
    one = text(9)
    requests = asked([text(1), one, text(30), one, text(17), one, text(2), text(40), text(1)])
    completions = finish(Engine(*made, 3), requests)
    check(made, requests, completions)
    assert len({tuple(done.tokens) for done in completions}) > 5


def test_a_prompt_that_is_read_in_parts(made, parts, monkeypatch):
    monkeypatch.setattr(engine, "PART", 16)
    requests = asked([text(41), text(7), text(1)])
    check(made, requests, finish(Engine(*made, 1, together=False), requests))
    assert parts == [(0, 16), (16, 16), (32, 8), (0, 6)]


def test_a_turn_goes_on_from_the_whole_row_before_or_is_read_anew(made, parts):
    one, prompt = conversation(*made, ()), text(9)

    def say(prompt, **how):
        requests = asked([prompt], **how)
        (done,) = finish(one, requests)
        check(made, requests, [done])
        return np.concatenate([prompt, done.tokens])

    so_far = say(np.concatenate([say(prompt), text(4)]))
    assert parts == [(0, 8), (8 + NEW, 4)]
    # A state cannot be cut back to where another turn differs, nor to where a text ended while the device went on.
    say(np.concatenate([so_far[:12], text(3)]))
    assert parts[2:] == [(0, 14)]
    ended = say(prompt, stops_at=lambda tokens: len(tokens) == 3)
    say(np.concatenate([ended, text(4)]))
    assert parts[3:] == [(0, 8), (0, 15)]


def test_a_request_that_is_given_up_leaves_its_neighbors_alone(made):
    requests = asked([text(12), text(20), text(5)])
    made_ = Engine(*made, 2)
    numbers = [made_.add(request) for request in requests]
    made_.step(limit=2)
    made_.cancel(numbers[0])
    completions = {}
    while made_.busy:
        completions |= made_.step(limit=2)[1]
    check(made, requests[1:], [completions[number] for number in numbers[1:]])
