"""Keys and values of one layer that later ones use instead of their own (Brandon et al. 2024; Gemma 3n and 4)."""

from typing import Any

import jax

from ftjax.models.groups import Group, Stack, stacks
from ftjax.models.spec import DecoderSpec


def lenders(spec: DecoderSpec) -> set[int]:
    """The layers whose keys and values others use."""
    return {stack.spec.kv_layer for stack in stacks(spec)} - {None}


def lends(spec: DecoderSpec, stack: Stack) -> bool:
    return not lenders(spec).isdisjoint(stack.layers)


def lent(spec: DecoderSpec, group: Group, cache: Any, new: Any) -> dict[int, Any]:
    """{layer: (its new keys and values, those in the cache or ())} of the lenders in a group, [B, kv_heads, ., d] each.

    cache, new: what the group takes and returns, as of `groups.nested`.
    """
    several, out = len(group.stacks) > 1, {}
    for number, stack in enumerate(group.stacks):
        for layer in lenders(spec).intersection(stack.layers):
            place, own = stack.layers.index(layer), (new[number], cache[number]) if several else (new, cache)
            out[layer] = jax.tree.map(lambda x, place=place: x[place], own)
    return out
