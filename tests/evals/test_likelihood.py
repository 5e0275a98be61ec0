"""Log-likelihoods of continuations are those of transformers' torch model, whatever shares their batches."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from support import PYTHONPATH, SUPPORT, xla_flags
from support.tiny import CONFIG, documents, numpy_params, one_device, spec
from support.witness import torch_llama, torch_logits

from ftjax.errors import UserError
from ftjax.evals import likelihood
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.models.decoder import Decoder

LENGTHS = [2, 3, 31, 32, 33, 40, 65]


@pytest.fixture(scope="module")
def model():
    return Decoder(spec())


@pytest.fixture(scope="module")
def params(model):
    return numpy_params(model)


def items():
    texts = [tokens for tokens, _ in documents(0, LENGTHS)]
    return [Item(tokens[: max(1, len(tokens) // 3)], tokens[max(1, len(tokens) // 3) :]) for tokens in texts]


def test_they_are_those_of_transformers(model, params, monkeypatch, record_figure):
    monkeypatch.setattr(likelihood, "TOKENS", 64)  # several batches
    witness = torch_llama(CONFIG, params)
    seen = []
    with jax.set_mesh(one_device()):
        found = log_likelihoods(model, {"params": params}, items(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(LENGTHS), len(LENGTHS))
    assert len(seen) > 3
    worst, every = 0.0, []
    for item, mine in zip(items(), found, strict=True):
        logits = torch_logits(witness, np.concatenate(item)).astype(np.float64)[len(item.context) - 1 : -1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = np.take_along_axis(logps, item.continuation[:, None], -1)[:, 0]
        every.extend(wanted)
        worst = max(worst, np.abs(mine.logps - wanted).max())
        np.testing.assert_allclose(mine.logps, wanted, atol=1e-5)
        assert mine.total == pytest.approx(wanted.sum(), abs=1e-4)
        assert mine.tokens == len(item.continuation)
        assert mine.greedy == (logits.argmax(-1) == item.continuation).all()
    assert likelihood.perplexity(found) == pytest.approx(np.exp(-np.mean(every)), rel=1e-5)
    record_figure("largest difference of a log-probability", worst)


def test_what_greedy_decoding_would_write_is_said_so(model, params):
    context = items()[3].context
    logits = torch_logits(torch_llama(CONFIG, params), context)[-1]
    best, other = int(logits.argmax()), int(logits.argmin())
    found = log_likelihoods(model, {"params": params}, [Item(context, [best]), Item(context, [other])])
    assert [one.greedy for one in found] == [True, False]


def test_a_text_beyond_the_positions_is_refused(model, params):
    with pytest.raises(UserError, match="text 1 has 66 tokens, of which all but the last must fit the model's 64 pos"):
        log_likelihoods(model, {"params": params}, [Item([1], [2]), Item([1], [2] * 65)])


@pytest.mark.slow
def test_meshes_give_what_one_device_gives(record_figure):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(8), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "error", str(SUPPORT / "likelihood_sharded_run.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    for mesh, differences in json.loads(done.stdout).items():
        for name, value in differences.items():
            record_figure(f"{mesh}: {name}", value)
            assert value < 1e-5, (mesh, name)
