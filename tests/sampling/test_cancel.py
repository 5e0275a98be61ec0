"""A request that is given up: what it wrote comes back, its slot is the next one's, and the others do not see it."""

import numpy as np
import pytest
from sampling.test_row_adapters import adapter
from support.tiny import numpy_params, spec

from ftjax.models.decoder import Decoder
from ftjax.sampling import engine
from ftjax.sampling.adapters import stack
from ftjax.sampling.engine import Engine, Request, stream_from
from ftjax.sampling.sampler import Sampling

MODEL = Decoder(spec(max_position_embeddings=512))
VARIABLES = {"params": numpy_params(MODEL)}
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 61, length).astype(np.int32) for length in (5, 90, 7)]


def request(number, count=40):
    return Request(PROMPTS[number], count, Sampling(temperature=1.0, seed=3), number=number)


def finish(made, limit=8):
    completions = {}
    while made.busy:
        completions |= made.step(limit)[1]
    return completions


@pytest.fixture(scope="module")
def alone():
    """What each request writes by itself."""
    out = []
    for number in range(3):
        made = Engine(MODEL, VARIABLES, 1)
        made.add(request(number))
        out.append(finish(made)[0].tokens.tolist())
    return out


def test_what_was_written_comes_back_and_the_slot_is_free_at_the_next_step(alone):
    made = Engine(MODEL, VARIABLES, 2)
    for number in range(3):
        made.add(request(number))
    new, _ = made.step(8)
    assert sorted(new) == [0, 1]  # the third waits
    given_up = made.cancel(0)
    assert given_up.tokens.tolist() == alone[0][:8]
    assert (given_up.stopped, given_up.stop_token, len(given_up.logps)) == (False, None, 8)
    new, ended = made.step(8)
    assert sorted(new) == [1, 2]
    completions = ended | finish(made)
    assert {number: one.tokens.tolist() for number, one in completions.items()} == {1: alone[1], 2: alone[2]}


def test_one_that_waits_has_written_nothing(alone):
    made = Engine(MODEL, VARIABLES, 1)
    for number in range(3):
        made.add(request(number))
    made.step(8)
    assert made.cancel(1).tokens.tolist() == []
    assert {number: one.tokens.tolist() for number, one in finish(made).items()} == {0: alone[0], 2: alone[2]}


def test_the_last_one_leaves_nothing_to_do():
    made = Engine(MODEL, VARIABLES, 2)
    made.add(request(0))
    made.step(8)
    made.cancel(0)
    assert not made.busy
    assert made.step() == ({}, {})


def test_a_request_that_is_not_there_is_refused():
    made = Engine(MODEL, VARIABLES, 1)
    made.add(request(0, 4))
    finish(made)
    for number in (0, 1):
        with pytest.raises(ValueError, match=f"request {number}: there is none of this number, or it has ended"):
            made.cancel(number)


def test_a_stream_ends_where_its_request_is_canceled(alone):
    made = Engine(MODEL, VARIABLES, 1)
    streamed = stream_from(made, request(0))
    first = [next(streamed) for _ in range(5)]
    made.cancel(0)
    assert (first, list(streamed)) == (alone[0][:5], [])


def test_the_next_turn_goes_on_from_what_a_canceled_one_left(alone, monkeypatch):
    """Only the rest is read: the prompt, and the tokens that were written, but for the last."""
    read = []
    original = engine.compiled.read_on
    monkeypatch.setattr(engine.compiled, "read_on", lambda *args: read.append(int(args[-2])) or original(*args))
    made = Engine(MODEL, VARIABLES, 2, reuse=True)
    made.add(request(1))
    made.step(8)
    written = made.cancel(0).tokens
    turn = np.concatenate([PROMPTS[1], written, PROMPTS[2]])
    made.add(Request(turn, 8))
    (completion,) = finish(made).values()
    assert read[0] == len(PROMPTS[1]) + 8 - 1
    whole = Engine(MODEL, VARIABLES, 1)
    whole.add(Request(turn, 8))
    assert completion.tokens.tolist() == finish(whole)[0].tokens.tolist()


def test_the_adapter_of_a_canceled_request_may_be_replaced():
    first, second = (adapter(MODEL, "q_proj", 2, 1.0, seed) for seed in (0, 1))
    made = Engine(MODEL, VARIABLES, 1, adapters=stack(MODEL, VARIABLES, [first]))
    number = made.add(Request(PROMPTS[0], 8, adapter=0))
    made.step(4)
    with pytest.raises(ValueError, match="adapter 0 is in use"):
        made.set_adapter(0, second)
    assert made.has(number)
    made.cancel(number)
    assert not made.has(number)
    made.set_adapter(0, second)
    again = made.add(Request(PROMPTS[0], 8, adapter=0))
    alone = Engine(MODEL, VARIABLES | {"lora": second}, 1)
    alone.add(Request(PROMPTS[0], 8))
    assert finish(made)[again].tokens.tolist() == finish(alone)[0].tokens.tolist()
