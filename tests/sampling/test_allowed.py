"""What the host allows a row next, what a row has written so far, and prompts that are read in parts."""

import numpy as np
from support.tiny import batch_of, logits, numpy_params, spec

from ftjax.models.decoder import Decoder
from ftjax.sampling.engine import Engine, Request
from ftjax.sampling.sampler import Sampling

MODEL = Decoder(spec(max_position_embeddings=256))
VARIABLES = {"params": numpy_params(MODEL)}
PROMPTS = [np.random.default_rng(i).integers(0, 61, length).astype(np.int32) for i, length in enumerate((5, 90, 33, 7))]


def only(tokens):
    """The words of a vocabulary of 61 in which these are allowed."""
    bits = np.zeros(64, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def by_place(tokens):
    """Even tokens first, then odd ones, and so on."""
    return only(range(len(tokens) % 2, 61, 2))


def finish(made, requests):
    numbers, ended = [made.add(request) for request in requests], {}
    while made.busy:
        ended |= made.step()[1]
    return [ended[number] for number in numbers]


def test_only_what_is_allowed_is_chosen_and_it_is_the_likeliest_of_that():
    (made,) = finish(Engine(MODEL, VARIABLES, 2), [Request(PROMPTS[0], 8, allows=by_place)])
    assert (made.tokens % 2).tolist() == [0, 1] * 4
    whole = np.concatenate([PROMPTS[0], made.tokens])
    batch = batch_of([[(whole, np.ones(len(whole), bool))]], len(whole))
    said = logits(MODEL, VARIABLES, batch)[0].astype(np.float64)
    for place, (token, logp) in enumerate(zip(made.tokens, made.full_logps, strict=True)):
        row = said[len(PROMPTS[0]) - 1 + place]
        row = np.where(np.arange(61) % 2 == place % 2, row, -np.inf)
        assert token == row.argmax()
        np.testing.assert_allclose(logp, row[token] - np.log(np.exp(row).sum()), rtol=1e-4, atol=1e-5)


def test_draws_are_of_what_is_allowed_and_the_rows_beside_are_as_without_it():
    drawn = Sampling(1.0, top_p=0.9, seed=5)
    plain = [Request(prompt, 12, drawn, number=number) for number, prompt in enumerate(PROMPTS)]
    alone = finish(Engine(MODEL, VARIABLES, 4), plain)
    one = Request(PROMPTS[1], 6, drawn, number=9, allows=lambda tokens: only([3, 60]))
    *beside, made = finish(Engine(MODEL, VARIABLES, 5), [*plain, one])
    assert set(made.tokens.tolist()) <= {3, 60}
    assert [row.tokens.tolist() for row in beside] == [row.tokens.tolist() for row in alone]


def test_what_a_row_has_written_so_far():
    made = Engine(MODEL, VARIABLES, 1)
    numbers = [made.add(Request(prompt, 12)) for prompt in PROMPTS[:2]]
    new, _ = made.step(5)
    written = made.written(numbers[0])
    assert written.tokens.tolist() == new[numbers[0]]
    assert len(written.full_logps) == 5
    assert not written.stopped
    assert made.written(numbers[1]).tokens.tolist() == []


def test_prompts_that_are_not_read_together_say_the_same():
    requests = [Request(prompt, 12, number=number) for number, prompt in enumerate([*PROMPTS, PROMPTS[1], PROMPTS[0]])]
    together = finish(Engine(MODEL, VARIABLES, 3), requests)
    for reuse in (False, True):
        parts = finish(Engine(MODEL, VARIABLES, 3, together=False, reuse=reuse), requests)
        for one, other in zip(parts, together, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.full_logps, other.full_logps, rtol=1e-4, atol=1e-5)
