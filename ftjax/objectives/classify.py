"""Classes: of whole documents, and of the steps of an answer, right or wrong."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.loss import Loss, Objective
from ftjax.objectives.scores import is_last, scores


def make_classify(model: Decoder, config: ConfigDict) -> Objective:
    """The objective over batches of documents whose labels are indices into `config.classes`.

    Cross-entropy of the head's logits at the last token of each, as transformers' models for sequence classification
    have it; a sum over documents whose weight is their number.
    """

    def classify(variables, batch, rng):
        there = is_last(batch["segment_ids"])
        return _cross_entropy(scores(model, variables, batch, rng), batch["labels"].astype(jnp.int32), there)

    return classify


def make_prm(model: Decoder, config: ConfigDict) -> Objective:
    """The objective over batches of answers in steps, labeled +1 or -1 at the token that ends a step and 0 elsewhere.

    Cross-entropy of two logits there, of a wrong step and of a right one (Lightman et al. 2023, section 2.6; TRL's and
    transformers' token classification); a sum over steps whose weight is their number.
    """

    def prm(variables, batch, rng):
        labels = batch["labels"]
        return _cross_entropy(scores(model, variables, batch, rng), (labels > 0).astype(jnp.int32), labels != 0)

    return prm


def _cross_entropy(logits: jax.Array, classes: jax.Array, there: jax.Array) -> Loss:
    """Over the places where there is a class. logits: float32 [B, T, K]; classes: int32 [B, T]; there: bool [B, T]."""
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[..., None], axis=-1)[..., 0]
    right = logits.argmax(-1) == classes
    count = there.astype(jnp.float32).sum()
    accuracy = jnp.sum(right & there, dtype=jnp.float32)
    return Loss(-jnp.sum(jnp.where(there, logps, 0)), count, {"accuracy": (accuracy, count)})
