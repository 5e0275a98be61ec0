"""Mixtures whose files hold the experts of a layer in one tensor, read as files in which each expert has its own."""

import re
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.models.families import FAMILIES

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def apart(reader: Any) -> Any:
    """`reader`, or one that takes stacked experts apart, where its family's names are those of single experts."""
    family = FAMILIES.get(str(reader.config.get("model_type")))
    single = family is not None and any(".experts.{}." in name for name in family.names.values())
    return ApartReader(reader) if single and any(map(_STACKED.fullmatch, reader.names())) else reader


class ApartReader:
    """A reader in which EXPERTS.gate_up_proj [experts, 2 inner, hidden], gates first, and EXPERTS.down_proj [experts,
    hidden, inner] are EXPERTS.{}.gate_proj.weight, EXPERTS.{}.up_proj.weight and EXPERTS.{}.down_proj.weight of each
    expert. Other tensors are as they are. UserError for stacks of other shapes.
    """

    def __init__(self, reader: Any):
        self.path, self.config = reader.path, reader.config
        self._reader = reader
        self._parts: dict[str, tuple[str, int, int, int]] = {}  # what it is in, which expert, its first row, its rows
        stored = reader.names()
        for name in stored:
            if not (found := _STACKED.fullmatch(name)):
                continue
            shape, parts = reader.shape(name), _PARTS[found[2]]
            if len(shape) != 3 or shape[1] % len(parts):
                raise UserError(f"{self.path}: {name} is {list(shape)}, not [experts, out, in]; get the weights again")
            rows = shape[1] // len(parts)
            for expert in range(shape[0]):
                for place, part in enumerate(parts):
                    self._parts[f"{found[1]}.{expert}.{part}.weight"] = (name, expert, place * rows, rows)
        self._names = {name for name in stored if not _STACKED.fullmatch(name)}
        if twice := sorted(self._names & self._parts.keys()):
            raise UserError(f"{self.path}: {twice[0]} is there alone and in {self._parts[twice[0]][0]}; remove one")
        self._names |= self._parts.keys()

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._reader.shape(name)
        stack, _, _, rows = self._parts[name]
        return rows, self._reader.shape(stack)[2]

    def dtype(self, name: str) -> np.dtype:
        return self._reader.dtype(self._parts[name][0] if name in self._parts else name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part of a tensor that `index` selects."""
        if name not in self._parts:
            return self._reader.read(name, index)
        stack, expert, first, rows = self._parts[name]
        start, stop, _ = (index[0] if index else slice(None)).indices(rows)
        return self._reader.read(stack, (slice(expert, expert + 1), slice(first + start, first + stop), *index[1:]))[0]
