"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from ftjax.models.decoder import Decoder
from ftjax.objectives.cross_entropy import cross_entropy
from ftjax.objectives.loss import Loss, Objective


def make_sft(model: Decoder) -> Objective:
    """The objective over batches of tokens, targets, weights, positions and segment_ids, all [B, T]."""

    def sft(variables, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)

        def unembed(hidden):
            return model.apply(variables, hidden, method=model.unembed, rngs=rngs)

        totals = cross_entropy(unembed, hidden, batch["targets"], batch["weights"])
        weight = batch["weights"].sum()
        metrics = {"mean_token_accuracy": (totals["correct"], weight), "entropy": (totals["entropy"], weight)}
        return Loss(totals["loss"], weight, metrics)

    return sft
