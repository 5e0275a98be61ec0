"""The head of numbers that a run goes on from: that of `config.adapter.source`, or of a base that has one."""

import numpy as np
from ml_collections import ConfigDict

from ftjax.errors import UserError
from ftjax.models.heads import SCORE
from ftjax.models.spec import DecoderSpec
from ftjax.tree import Tree
from ftjax.weights.hf.classifier import ClassifierReader
from ftjax.weights.peft import continued
from ftjax.weights.peft.adapter import StoredAdapter
from ftjax.weights.resized import original
from ftjax.weights.source import Reader


def kernel(config: ConfigDict, reader: Reader, spec: DecoderSpec, heads: Tree) -> np.ndarray | None:
    """float32 [D, K]; None where a run trains a new head, or none. reader: of the base. heads: shapes of the run's own.

    Raises UserError where the adapter or the base has a head of numbers, and the run none, or one of another width.
    """
    wanted = heads[SCORE]["kernel"].shape[-1] if SCORE in heads else 0
    for key, its in _found(config, reader, spec):
        has = f"config.{key}: {its.path} has a head of {its.width()} number{'s' if its.width() > 1 else ''}"
        if not wanted:
            raise UserError(
                f"{has} ({its.kind}) and none for tokens, which objective.name={config.objective.name!r} trains; take "
                "the model that it was made from, or a method for such models, such as objective.name=reward"
            )
        if its.width() != wanted:
            raise UserError(
                f"{has}, and this run's head has {wanted} (heads of an ensemble, or classes); set them alike, or take "
                "the model that it was made from"
            )
        return its.head()
    return None


def classifier(reader: Reader) -> ClassifierReader | None:
    """The reader of a reward model or a classifier, None of any other model."""
    files = original(reader)
    return files if isinstance(files, ClassifierReader) else None


def _found(config: ConfigDict, reader: Reader, spec: DecoderSpec) -> list[tuple[str, StoredAdapter | ClassifierReader]]:
    """[(key, what it names)] of what has a head of numbers; the first is gone on from."""
    both = {"adapter.source": continued.stored_adapter(config, spec), "model.source": classifier(reader)}
    return [(key, its) for key, its in both.items() if its is not None and its.kind]
