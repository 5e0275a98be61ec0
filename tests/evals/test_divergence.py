"""The divergence of a tuned model from its base is that of float64 NumPy over whole logits."""

import jax
import numpy as np
from support.tiny import CONFIG, documents, numpy_params, one_device, spec
from support.witness import torch_llama, torch_logits

from ftjax.evals.divergence import divergences
from ftjax.evals.likelihood import Item
from ftjax.models.decoder import Decoder


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_it_is_the_sum_over_the_vocabulary_at_every_place(record_figure):
    model = Decoder(spec())
    base, tuned = (numpy_params(model, seed) for seed in (0, 1))
    items = [Item(tokens[:3], tokens[3:]) for tokens, _ in documents(0, [5, 17, 31, 60])]
    with jax.set_mesh(one_device()):
        found = divergences(model, {"params": tuned}, {"params": base}, items)
        same = divergences(model, {"params": base}, {"params": base}, items)
    of_base, of_tuned = (torch_llama(CONFIG, params) for params in (base, tuned))
    for item, values, zeros in zip(items, found, same, strict=True):
        log_p, log_q = (log_softmax(torch_logits(its, np.concatenate(item))[2:-1]) for its in (of_base, of_tuned))
        expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        record_figure("largest difference", np.abs(values - expected).max())
        assert values.shape == item.continuation.shape
        assert not zeros.any()
