"""Adapters of a mixture's experts, as peft has them of the parameters that `target_parameters` names.

In transformers the experts of a layer have two parameters, gate_up_proj and down_proj, [experts, out, in] each,
whatever the files call their parts. For one, peft has a single A [r * experts, in], expert by expert, and a single B
[out, r * experts], of which the experts are the fastest index. Of gate and up apart, as most families have them here,
that is an adapter of both ranks together: A has the rows of one and then of the other, and B is zero where they would
mix.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftjax import lora
from ftjax.errors import UserError
from ftjax.models.spec import DecoderSpec
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.hf.together import gather
from ftjax.weights.peft import config as peft_config
from ftjax.weights.peft import experts
from ftjax.weights.peft import keys as peft_keys
from ftjax.weights.peft.config import LoraSettings
from ftjax.weights.peft.experts import Parameter
from ftjax.weights.peft.keys import PREFIX


class Joined(NamedTuple):
    """The adapters of one parameter, which are written as one."""

    parameter: Parameter
    adapters: dict[str, Mapping[str, Any]]  # {our module: its parts}

    @property
    def ranks(self) -> dict[str, int]:
        """{our module: its rank}"""
        return {module: parts["lora_a"].shape[-1] for module, parts in self.adapters.items()}

    def dtype(self, part: str) -> np.dtype:
        return np.result_type(*(parts[part].dtype for parts in self.adapters.values()))

    def layers(self) -> dict[tuple[int, ...], tuple[int, float]]:
        """{place of a layer with an adapter: (rank, scale)}"""
        rank = sum(self.ranks.values())
        return {place: (rank, scale) for place in self.parameter.key.places() if (scale := self.scale(place))}

    def scale(self, place: tuple[int, ...]) -> float:
        """alpha / r in a layer; UserError where gate and up have two."""
        scales = {
            float(value)
            for parts in self.adapters.values()
            for value in np.ravel(gather(parts["lora_scale"], place, everywhere=True))
        }
        return _one_scale(scales, self.adapters)

    def part(self, part: str, place: tuple[int, ...]) -> np.ndarray:
        """A layer's part as in the file."""
        a_rows, b_rows = [], []
        for module, parts in self.adapters.items():
            first, end = self.parameter.columns[module]
            a_rows.append(gather(parts["lora_a"], place))  # [experts, in, r]
            b = gather(parts["lora_b"], place)  # [experts, r, out]
            b_rows.append(np.pad(b, [(0, 0), (0, 0), (first, self.parameter.key.shape[1] - end)]))
        a, b = np.concatenate(a_rows, axis=2).swapaxes(1, 2), np.concatenate(b_rows, axis=1)  # [experts, r, in or out]
        if self.parameter.turned:
            a, b = b, a
        if part == "lora_a":
            return a.reshape(-1, a.shape[-1])
        return b.transpose(2, 1, 0).reshape(b.shape[-1], -1)


def _one_scale(scales: set[float], modules: Iterable[str]) -> float:
    if len(scales) > 1:
        raise UserError(
            f"{', '.join(modules)}: to peft these are one parameter, with one scale, and theirs are {sorted(scales)}; "
            "give them one rank and alpha in adapter.rank_pattern and adapter.alpha_pattern, or use --format merged"
        )
    return scales.pop()


def check_scales(scales: Mapping[str, float], spec: DecoderSpec) -> None:
    """The UserError of `write_adapter` for unlike scales, before there are any adapters; scales: by module."""
    for parameter in experts.parameters(spec).values():
        if its := {module: scales[module] for module in parameter.columns if module in scales}:
            _one_scale(set(its.values()), its)


def joined(modules: Mapping[str, Mapping[str, Any]], spec: DecoderSpec) -> dict[str, Joined]:
    """{parameter: what there is of it} of adapters by module, those of experts alone.

    ValueError for adapters that do not belong to `spec`.
    """
    keys, out = hf_names(spec), {}
    for name, parameter in experts.parameters(spec).items():
        its = {module: modules[module] for module in parameter.columns if module in modules}
        for module, parts in its.items():
            *stack, rows, columns = keys[f"{module}/kernel"].our_shape
            rank = parts["lora_a"].shape[-1]
            shapes = {"lora_a": (*stack, rows, rank), "lora_b": (*stack, rank, columns), "lora_scale": tuple(stack)}
            if {part: tuple(leaf.shape) for part, leaf in parts.items()} != shapes:
                raise ValueError(f"{module}: these are not the parts of an adapter of experts: {sorted(parts)}")
        if its:
            out[name] = Joined(parameter, its)
    return out


class Stored(NamedTuple):
    """A parameter's adapter in a file.

    Attributes:
      whole: the parameter's name in each layer.
      names: peft's module in each layer, None where the layer has no adapter.
      ranks, scales: in each layer.
      apart: {our module: its own ranks, from the first to the end}, where they are known to lie apart in it.
    """

    parameter: Parameter
    whole: list[str]
    names: list[str | None]
    ranks: list[int]
    scales: list[float]
    apart: dict[str, tuple[int, int]]

    @property
    def modules(self) -> list[str]:
        """Ours that have an adapter in it."""
        return list(self.apart or self.parameter.columns)

    def rank_of(self, module: str, rank: int) -> int:
        """Of one of our modules, where the parameter's is `rank`."""
        first, end = self.apart.get(module, (0, rank))
        return end - first if rank else 0

    def read(self, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """{"layers/mlp/experts/up_proj/lora_a": [layers, experts, in, r], ...}; where layers have different ranks, the
        smaller ones are padded with zeros. read: gives the tensor of a name.
        """
        count, width, rows = self.parameter.key.shape
        most, leaves = max(self.ranks), {}
        for name, rank, scale in zip(self.names, self.ranks, self.scales, strict=True):
            a, b = np.zeros((count, most, rows), np.float32), np.zeros((count, most, width), np.float32)
            if name is not None:
                (of_a, _), (of_b, _) = self.parameter.parts(name, rank).values()
                first = read(of_a).reshape(count, rank, -1)
                second = read(of_b).reshape(-1, rank, count).transpose(2, 1, 0)
                a[:, :rank], b[:, :rank] = (second, first) if self.parameter.turned else (first, second)
                self._check(name, b)
            for module in self.modules:
                start, end = self.parameter.columns[module]
                low, high = self.apart.get(module, (0, most))
                leaves.setdefault(f"{module}/lora_a", []).append(a[:, low:high].swapaxes(1, 2))
                leaves.setdefault(f"{module}/lora_b", []).append(b[:, low:high, start:end])
                leaves.setdefault(f"{module}/lora_scale", []).append(np.full(count, scale, np.float32))
        return {path: np.stack(of_layers) for path, of_layers in leaves.items()}

    def _check(self, name: str, b: np.ndarray) -> None:
        """UserError where what lay apart in b [experts, r, out] has been trained together since."""
        for module, (low, high) in self.apart.items():
            start, end = self.parameter.columns[module]
            if b[:, low:high, :start].any() or b[:, low:high, end:].any():
                raise UserError(
                    f"{name}.lora_B.weight: it has changed since ftjax_adapter.json was written beside it; take "
                    '"experts" out of that file, and all of its rank is read for each projection'
                )


def stored(
    facts: dict[str, Any],
    config: dict[str, Any],
    settings: LoraSettings,
    spec: DecoderSpec,
    multimodal: bool,
) -> tuple[Stored, ...]:
    """Of each parameter of experts that target_parameters names, what the file has to hold of it.

    config: the content of adapter_config.json; facts: that of ftjax_adapter.json, {} where there is none.
    """
    parameters, out = experts.parameters(spec), []
    names = {module: peft_keys.layer_names(its.key, multimodal) for module, its in parameters.items()}
    targets = {name for its in names.values() for name in its if peft_config.is_target(name, config, True)}
    for module, parameter in parameters.items():
        if not targets.intersection(names[module]):
            continue
        outer = names[experts.outside(module)]
        wrapped = [
            PREFIX + experts.wrapped(name, other in targets) if name in targets else None
            for name, other in zip(names[module], outer, strict=True)
        ]
        ranks = [peft_config.by_pattern(settings.rank_pattern, name, settings.rank) for name in names[module]]
        ranks = [rank if name in targets else 0 for name, rank in zip(names[module], ranks, strict=True)]
        alphas = [peft_config.by_pattern(settings.alpha_pattern, name, settings.alpha) for name in names[module]]
        scales = [lora.scale(r, alpha, settings.rslora) if r else 0.0 for r, alpha in zip(ranks, alphas, strict=True)]
        apart = _apart(facts.get("experts"), module, parameter, ranks)
        out.append(Stored(parameter, names[module], wrapped, ranks, scales, apart))
    return tuple(out)


def _apart(told: Any, name: str, parameter: Parameter, ranks: Sequence[int]) -> dict[str, tuple[int, int]]:
    """`Stored.apart`, of what write_adapter noted beside the adapter: {parameter: {our module: its rank}}.

    Without such a note, as of peft's own files, gate and up have the whole rank each, with the same A.
    """
    its, rank = told.get(name) if isinstance(told, dict) else None, max(ranks)
    if not isinstance(its, dict) or not its.keys() <= parameter.columns.keys() or {*ranks} - {0, rank}:
        return {}
    if not all(type(own) is int and own > 0 for own in its.values()):
        return {}
    ends = np.cumsum([0, *its.values()])
    return dict(zip(its, zip(ends[:-1].tolist(), ends[1:].tolist()))) if ends[-1] == rank else {}
