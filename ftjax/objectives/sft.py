"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.cross_entropy import cross_entropy
from ftjax.objectives.head import head_of, make_unembed
from ftjax.objectives.loss import Loss, Objective


def make_sft(model: Decoder, config: ConfigDict | None = None) -> Objective:
    """The objective over batches of the arrays of `packing.BATCH`, all [B, T]; it has no settings."""
    unembed = make_unembed(model)

    def sft(variables, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
        head = head_of(model, variables)
        totals = cross_entropy(unembed, head, hidden, batch["targets"], batch["weights"], rng)
        weight = batch["weights"].sum()
        metrics = {"mean_token_accuracy": (totals["correct"], weight), "entropy": (totals["entropy"], weight)}
        return Loss(totals["loss"], weight, metrics)

    return sft
