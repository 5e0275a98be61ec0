"""How a decoder's layers are cut into scans, and what the parameters of each are called: the one place that knows.

Layers of one kind are stacked on a leading axis and scanned, so that they are one compiled body however many there are.
A decoder of unlike layers is a sequence of such scans, its groups. A group is a period: one or several stacks, of which
a layer each makes one round of the scan.

Which groups: those with the fewest bodies to compile. With D for dense and S for sparse layers:

    D S S S S S S S      D, S x 7            a prefix (DeepSeek, GLM): 2 bodies in 2 groups
    D S D S D S D S      (D S) x 4           a period (decoder_sparse_step): 2 bodies in 1 group
    S D S S S D S S      (S D S S) x 2       what looks irregular may be a period: 4 bodies
    S D S S S D          S, D, S x 3, D      runs where nothing repeats: 4 bodies

Names: a level in the path of a parameter exists where there is more than one thing to tell apart. So a decoder of like
layers has `layers/mlp/...`; the groups of the prefix above are `layers/dense_0/mlp/...` and `layers/sparse_1/mlp/...`,
and the stacks of the period likewise. A stack is called by its kind and its first layer, counted as Hugging Face does.
A period that is one group of several is `period_` and its first layer: `layers/period_1/sparse_1/mlp/...`. All are
under `layers/`, so that a pattern such as `q_proj` or `^layers/` means in every decoder what it means in a plain one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from ftjax.models.spec import DecoderSpec, Kind

LAYERS = "layers"  # above all parameters of layers
LONGEST_PERIOD = 16  # layers


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one kind whose parameters are stacked: [len(layers), ...] each."""

    name: str  # "sparse_1"
    path: str  # above its parameters: "layers/sparse_1", or "layers" where it is the only one
    layers: tuple[int, ...]  # which of the decoder's, evenly spaced
    spec: DecoderSpec  # of these layers alone


@dataclasses.dataclass(frozen=True)
class Group:
    """Stacks of equally many layers that one scan runs through, a layer of each in turn."""

    name: str
    stacks: tuple[Stack, ...]


@functools.lru_cache(maxsize=64)
def groups(spec: DecoderSpec) -> tuple[Group, ...]:
    """The scans of a decoder in order, a single one of a single stack where layers are alike."""
    kinds = spec.layer_kinds or (Kind(""),) * spec.num_hidden_layers
    cuts, out = _cut(kinds), []
    for first, period, rounds in cuts:
        place = "" if len(cuts) == 1 else f"/{_name(kinds, first) if period == 1 else f'period_{first}'}"
        stacks = []
        for start in range(first, first + period):
            layers = tuple(range(start, first + period * rounds, period))
            name = _name(kinds, start)
            path = f"{LAYERS}{place}" if period == 1 else f"{LAYERS}{place}/{name}"
            stacks.append(Stack(name, path, layers, spec.of_layers(layers)))
        out.append(Group(place.removeprefix("/"), tuple(stacks)))
    return tuple(out)


def stacks(spec: DecoderSpec) -> list[Stack]:
    """Of all groups, in order."""
    return [stack for group in groups(spec) for stack in group.stacks]


def stack_of(spec: DecoderSpec, path: str) -> Stack | None:
    """The stack that a parameter belongs to, or an adapter of it; None outside the layers. No collection in front."""
    return next((stack for stack in stacks(spec) if path.startswith(f"{stack.path}/")), None)


def nested(spec: DecoderSpec, of_stack: Callable[[Stack], Any]) -> Any:
    """What of_stack gives for each stack, in tuples by group and by stack as modules are; no tuple around one alone."""
    return _alone([_alone([of_stack(stack) for stack in group.stacks]) for group in groups(spec)])


def _alone(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tuple(parts)


def _name(kinds: Sequence[Kind], layer: int) -> str:
    return f"{kinds[layer].name}_{layer}"


def _cut(kinds: Sequence[Kind]) -> list[tuple[int, int, int]]:
    """[(first layer, layers in a period, rounds)] with the fewest bodies, and of those cuts one with the fewest groups.

    A period of several layers has two rounds at least, and each as many as there are.
    """
    count = len(kinds)
    # runs[period][i]: how many layers from i on are of the kind of the layer a period later
    runs = {period: [0] * (count + 1) for period in range(1, min(LONGEST_PERIOD, count) + 1)}
    # From each layer to the end: bodies and groups in all, period and rounds of the first of these groups.
    best = [(0, 0, 0, 0)] * (count + 1)
    for first in reversed(range(count)):
        choices = []
        for period, run in runs.items():
            later = first + period
            run[first] = run[first + 1] + 1 if later < count and kinds[first] == kinds[later] else 0
            rounds = 1 + run[first] // period
            if period == 1 or rounds > 1:
                bodies, groups, *_ = best[first + period * rounds]
                choices.append((period + bodies, 1 + groups, period, rounds))
        best[first] = min(choices)
    cuts, first = [], 0
    while first < count:
        _, _, period, rounds = best[first]
        cuts.append((first, period, rounds))
        first += period * rounds
    return cuts
