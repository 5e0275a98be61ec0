"""A model with more tokens than its files: rows are added to the embedding and to the output head."""

from pathlib import Path
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.models.families import is_multimodal, spec_from_config
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.load import stored_names
from ftjax.weights.source import Reader

_HEAD = "lm_head.weight"
_BLOCK = 2**24  # values that are read at once for the mean


class ResizedReader:
    """A reader in which embedding and head, [vocab, width], have `rows` rows; a `Reader` itself.

    A new row is the mean of the old ones, so that a new token is about as likely as others at first (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). transformers' `resize_token_embeddings` draws new rows from
    a normal distribution around that mean, of a covariance 1e-9 times that of the old rows.
    """

    def __init__(self, reader: Reader, rows: int):
        self.path: Path = reader.path
        stored = stored_names(reader)
        spec = spec_from_config(reader.config)
        if spec.head_bias:
            raise UserError(
                f"{reader.path}: the output head of a {spec.family!r} model has a bias, to which rows are not added; "
                "leave config.model.add_tokens and config.model.resize_vocab out"
            )
        if spec.per_layer is not None:
            raise UserError(
                f"{reader.path}: a {spec.family!r} model has a second embedding, of each layer, to which rows are not "
                "added; leave config.model.add_tokens and config.model.resize_vocab out"
            )
        embedding = hf_names(spec)["embed_tokens/embedding"].name(())
        self.original, self._rows = reader, rows
        self._resized = {stored[name] for name in (embedding, _HEAD) if name in stored}
        self._means: dict[str, np.ndarray] = {}
        size = {"vocab_size": rows}
        inner = reader.config.get("text_config")  # of some multimodal models its content is at the top
        text = {"text_config": inner | size} if is_multimodal(reader.config) and inner else size
        self.config: dict[str, Any] = reader.config | text

    def names(self) -> set[str]:
        return self.original.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.original.shape(name)
        return (self._rows, *shape[1:]) if name in self._resized else shape

    def dtype(self, name: str) -> np.dtype:
        return self.original.dtype(name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects."""
        if name not in self._resized:
            return self.original.read(name, index)
        old, (first, *others) = self.original.shape(name)[0], index or (slice(None),)
        start, stop, _ = first.indices(self._rows)
        parts = [self.original.read(name, (slice(start, min(stop, old)), *others))] if start < old else []
        if stop > old:
            mean = self._mean(name)[tuple(others)]
            parts.append(np.broadcast_to(mean, (stop - max(start, old), *mean.shape)))
        return np.concatenate(parts)

    def _mean(self, name: str) -> np.ndarray:
        """The mean of the old rows, [width], in the dtype of the tensor."""
        if name not in self._means:
            rows, width = self.original.shape(name)
            step = max(1, _BLOCK // width)
            blocks = (self.original.read(name, (slice(i, min(i + step, rows)),)) for i in range(0, rows, step))
            total = sum(block.astype(np.float64).sum(axis=0) for block in blocks)
            self._means[name] = (total / rows).astype(self.original.dtype(name))
        return self._means[name]


def original(reader: Reader) -> Reader:
    """The reader of the model's files, also of one that was given more rows."""
    return reader.original if isinstance(reader, ResizedReader) else reader
