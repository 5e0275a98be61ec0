"""Rows of very different lengths: how many steps of slots pass unused while requests wait for one."""

import numpy as np
import pytest
from support.tiny import numpy_params, spec

from ftjax.models.decoder import Decoder
from ftjax.sampling import engine
from ftjax.sampling.engine import Engine, Request


@pytest.mark.parametrize("slots", [16, *(pytest.param(slots, marks=pytest.mark.slow) for slots in (4, 32))])
@pytest.mark.parametrize("order", ["as they come", "the longest last", "ended by text"])
def test_at_most_15_percent_of_slots_wait_with_16_to_256_new_tokens(slots, order, monkeypatch, record_figure):
    model = Decoder(spec(max_position_embeddings=512))
    rng, used, steps, chosen = np.random.default_rng(slots), [], [], []
    decode = engine.compiled.decode

    def recorded(*args):
        out, enough = decode(*args), int(args[6])
        there = np.asarray(out[2])
        chosen.append(int(there.sum()))
        if enough <= slots:  # else nothing waits
            used.append(int(there.sum()))
            steps.append(int(there.any(axis=1).sum()))
        return out

    monkeypatch.setattr(engine.compiled, "decode", recorded)
    made = Engine(model, {"params": numpy_params(model)}, slots)
    news = rng.integers(16, 257, 5 * slots)
    for new in sorted(news) if order == "the longest last" else news:
        prompt, new = rng.integers(0, 61, rng.integers(2, 30)).astype(np.int32), int(new)
        if order == "ended by text":  # by the host, that is, and the device goes on in vain for a while
            made.add(Request(prompt, 300, stops_at=lambda tokens, new=new: len(tokens) == new))
        else:
            made.add(Request(prompt, new))
    ended = {}
    while made.busy:
        ended |= made.step()[1]
    assert sorted(len(completion.tokens) for completion in ended.values()) == sorted(news)
    in_vain = sum(chosen) - sum(news)
    assert (in_vain > 0) == (order == "ended by text")
    lost = 1 - (sum(used) - in_vain) / (slots * sum(steps))
    record_figure("share of slots' steps lost", lost)
    assert lost <= 0.15
