"""The head of numbers that a run goes on from: that of `config.adapter.source`, or of a base that has one."""

import numpy as np
from ml_collections import ConfigDict

from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.classifier import ClassifierReader
from ftjax.weights.peft import continued
from ftjax.weights.peft.adapter import StoredAdapter
from ftjax.weights.resized import original
from ftjax.weights.source import Reader


def kernel(config: ConfigDict, reader: Reader, spec: DecoderSpec) -> np.ndarray | None:
    """float32 [D, K]; None where a new head is trained. reader: of the base."""
    _, its = next(iter(_found(config, reader, spec)), (None, None))
    return its and its.head()


def check(config: ConfigDict, reader: Reader, spec: DecoderSpec, width: int) -> None:
    """UserError for an adapter or a base with a head for other than `width` numbers, 0 for a run that trains none."""
    for key, its in _found(config, reader, spec):
        has = f"config.{key}: {its.path} has a head of {its.width()} number{'s' if its.width() > 1 else ''}"
        if not width:
            raise UserError(
                f"{has} ({its.kind}) and none for tokens, which objective.name={config.objective.name!r} trains; take "
                "the model that it was made from, or a method for such models, such as objective.name=reward"
            )
        if its.width() != width:
            raise UserError(
                f"{has}, and this run's head has {width} (heads of an ensemble, or classes); set them alike, or take "
                "the model that it was made from"
            )


def classifier(reader: Reader) -> ClassifierReader | None:
    """The reader of a reward model or a classifier, None of any other model."""
    files = original(reader)
    return files if isinstance(files, ClassifierReader) else None


def _found(config: ConfigDict, reader: Reader, spec: DecoderSpec) -> list[tuple[str, StoredAdapter | ClassifierReader]]:
    """[(key, what it names)] of what has a head of numbers; the first is gone on from."""
    both = {"adapter.source": continued.stored_adapter(config, spec), "model.source": classifier(reader)}
    return [(key, its) for key, its in both.items() if its is not None and its.kind]
