"""GGUF files (llama.cpp's): tensors dequantized to float32 under Hugging Face names, and the config they imply."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.quants import dequantize

from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights.gguf.config import hf_config
from ftjax.weights.gguf.header import Tensor, read_header
from ftjax.weights.gguf.names import Place, gguf_places, half_split
from ftjax.weights.hf.keys import flipped

# Tensors whose values are in the config.
_COMPUTED = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class _Stored(NamedTuple):
    """A Hugging Face tensor as the file has it; an expert's is a slice of the tensor of all experts."""

    parts: dict[int, Tensor]  # by `Place.part`
    place: Place | None  # None: Hugging Face has no name for it


# Where converters say what a file was made from; of an older one of llama.cpp, and of today's.
_SOURCES = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url")
_HUB_ID = re.compile(r"(?:https?://(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+)/?")


def hub_id(metadata: Mapping[str, Any]) -> str:
    """The Hugging Face id of the model that a file was converted from, as its metadata say; "" where they do not.

    The first "base model" of a file is mostly what its model was fine-tuned from, which has other weights. It counts
    where it has the file's own name: copies of a model name the original in this way.
    """
    names = [metadata.get(key) for key in _SOURCES]
    base = metadata.get("general.base_model.0.repo_url")
    if isinstance(base, str) and _words(base.rstrip("/").rpartition("/")[2]) == _words(metadata.get("general.name")):
        names.append(base)
    found = [match[1] for name in names if isinstance(name, str) and (match := _HUB_ID.fullmatch(name))]
    return found[0] if found else ""


def _words(name: Any) -> list[str]:
    return re.split(r"[\s_-]+", str(name).lower())


class GGUFReader:
    """One GGUF file of a model. Raises UserError when it is malformed or not supported.

    `metadata` holds every key of the file (tokens and merges as lists of str, chat template included);
    `config` is the Hugging Face config made from it. `shape`, `dtype` and `read` raise KeyError for a name
    that is not in `names()`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, tensors = read_header(path)
        self.config = hf_config(path, self.metadata, tensors)
        try:
            spec = spec_from_config(self.config)
        except UserError as error:
            raise UserError(f"{path}: its metadata make no usable config: {error}") from error
        places = gguf_places(spec, self.metadata["general.architecture"])
        self._tensors: dict[str, _Stored] = {}
        for name, tensor in tensors.items():
            if name in places:
                self._add(name, tensor, places[name])
            elif name not in _COMPUTED:
                self._tensors[name] = _Stored({0: tensor}, None)
        for name, (parts, place) in self._tensors.items():
            shapes = [list(parts[part].shape) for part in sorted(parts)]
            if place and (len(shapes) < place.parts or any(shape != shapes[0] for shape in shapes)):
                raise UserError(f"{path}: gate and up of {name} have the shapes {shapes}, not two alike")

    def _add(self, name: str, tensor: Tensor, place: Place) -> None:
        names, shape = place.hf_names(), tensor.shape
        if place.heads and shape[0] != place.shape[0]:
            raise UserError(
                f"{self.path}: {name} has {shape[0]} rows, not {place.heads} heads of size "
                f"{place.shape[0] // place.heads}"
            )
        if not place.split:
            self._tensors.setdefault(names[0], _Stored({}, place)).parts[place.part] = tensor
            return
        if len(shape) != 3 or shape[0] != len(names):
            raise UserError(f"{self.path}: {name} has the shape {list(shape)}, not that of {len(names)} experts")
        for expert, hf_name in enumerate(names):
            self._tensors[hf_name] = _Stored({0: Tensor(shape[1:], tensor.kind, tensor.raw[expert])}, place)

    def names(self) -> set[str]:
        """Hugging Face names; a tensor that has none there keeps GGUF's."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        parts, place = self._tensors[name]
        shape = flipped(parts[0].shape) if place and place.flipped else parts[0].shape
        return (*shape[:-1], shape[-1] * len(parts))

    def dtype(self, name: str) -> np.dtype:
        assert name in self._tensors
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """float32, the part that `index` selects; only the rows it names are dequantized."""
        parts, place = self._tensors[name]
        shape, count = self.shape(name), len(parts)
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        if count == 1:
            return _values(parts[0], place, index)
        first, last, _ = index[-1].indices(shape[-1])
        columns = slice(first // count, -(-last // count))
        read = [_values(parts[part], place, (*index[:-1], columns)) for part in range(count)]
        # Laid out in memory as they are, [experts, out, in]: to stack them would transpose them.
        in_turns = np.empty_like(read[0], shape=(*read[0].shape[:-1], count * read[0].shape[-1]))
        for part, values in enumerate(read):
            in_turns[..., part::count] = values
        skipped = first - count * columns.start
        return in_turns[..., skipped : skipped + last - first]


def _values(tensor: Tensor, place: Place | None, index: tuple[slice, ...]) -> np.ndarray:
    """float32, the part of one tensor that `index`, a slice for each of Hugging Face's dimensions, selects."""
    shape, kind, raw = tensor
    if place and place.flipped:
        return dequantize(raw[(*index[:-2], index[-1])], kind)[..., index[-2]].swapaxes(-1, -2)
    if place and place.heads:
        order = half_split(shape[0], place.heads)
        if len(shape) == 1:
            return dequantize(raw, kind)[order][index[0]]
        return dequantize(raw[order[index[0]]], kind)[..., index[-1]]
    values = dequantize(raw[index[:-1]], kind)[..., index[-1]]
    return values - np.float32(1) if place and place.plus_one else values
