"""The supervised objective: sums and weights over trained tokens only."""

import jax
import numpy as np
from support.tiny import batch_of, documents, logits, numpy_params, spec

from ftjax.models.decoder import Decoder
from ftjax.objectives.sft import make_sft


def test_loss_accuracy_and_entropy_are_sums_over_trained_tokens():
    model = Decoder(spec())
    params = numpy_params(model)
    docs = documents(0, [9, 4, 6])
    batch = batch_of([docs[:2], docs[2:]], 14)
    loss = jax.jit(lambda params: make_sft(model)({"params": params}, batch, jax.random.key(0)))(params)

    trained = sum(int(mask[1:].sum()) for _, mask in docs)  # the first token of a document is never a target
    full = logits(model, {"params": params}, batch).astype(np.float64)
    log_probs = full - np.log(np.exp(full).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0] * batch["weights"]).sum()
    entropy = -((np.exp(log_probs) * log_probs).sum(-1) * batch["weights"]).sum()
    correct = ((full.argmax(-1) == batch["targets"]) * batch["weights"]).sum()
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)
    assert float(loss.weight) == trained == batch["weights"].sum()
    assert loss.metrics.keys() == {"mean_token_accuracy", "entropy"}
    np.testing.assert_allclose(loss.metrics["entropy"], (entropy, trained), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["mean_token_accuracy"], (correct, trained))
