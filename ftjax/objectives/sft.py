"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from ml_collections import ConfigDict

from ftjax.models.decoder import Decoder
from ftjax.objectives.cross_entropy import PLAIN, Further, cross_entropy
from ftjax.objectives.head import head_of, make_unembed
from ftjax.objectives.loss import Loss, Objective


def make_sft(model: Decoder, config: ConfigDict | None = None) -> Objective:
    """The objective over batches of the arrays of `packing.BATCH`, all [B, T].

    config: `label_smoothing` and `z_loss` (see `Further`); None is without. With either there is one more metric, the
    cross-entropy alone.
    """
    unembed = make_unembed(model)
    further = Further(config.label_smoothing, config.z_loss) if config is not None else PLAIN

    def sft(variables, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        hidden, _ = model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
        head = head_of(model, variables)
        totals = cross_entropy(unembed, head, hidden, batch["targets"], batch["weights"], rng, further=further)
        weight = batch["weights"].sum()
        metrics = {"mean_token_accuracy": (totals["correct"], weight), "entropy": (totals["entropy"], weight)}
        if further != PLAIN:
            metrics["cross_entropy"] = (totals["nll"], weight)
        return Loss(totals["loss"], weight, metrics)

    return sft
