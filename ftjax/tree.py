"""Nested dicts of arrays addressed by paths such as `params/layers/mlp/up_proj/kernel`."""

import re
from collections.abc import Callable
from typing import Any

from flax import traverse_util

from ftjax.errors import UserError

Tree = dict[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> {path: leaf}; `unflatten` is its inverse. Paths come out in sorted order."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(leaves: dict[str, Any]) -> Tree:
    return traverse_util.unflatten_dict(leaves, sep="/")


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree by path into (chosen, rest); every leaf is in exactly one of the two.

    >>> partition({"a": {"b": 1, "c": 2}}, lambda path: path == "a/b")
    ({'a': {'b': 1}}, {'a': {'c': 2}})
    """
    leaves = flatten(tree)
    return (
        unflatten({path: leaf for path, leaf in leaves.items() if chosen(path)}),
        unflatten({path: leaf for path, leaf in leaves.items() if not chosen(path)}),
    )


def combine(a: Tree, b: Tree) -> Tree:
    """The inverse of `partition`; a path present on both sides is an error."""
    left, right = flatten(a), flatten(b)
    if both := left.keys() & right.keys():
        raise ValueError(f"paths on both sides: {sorted(both)[:5]}")
    return unflatten(left | right)


def matching(pattern: str, paths: list[str], key: str) -> list[str]:
    """The paths that the regular expression `pattern` finds (`re.search`); none is an error that names config `key`."""
    try:
        found = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise UserError(f"{key}={pattern!r} is not a regular expression: {error}") from error
    if not found:
        raise UserError(f"{key}={pattern!r} matches no parameter. Parameters are named like: {', '.join(paths[:12])}")
    return found


def count(tree: Tree) -> int:
    """The number of elements in all leaves (anything with a `.size`)."""
    return sum(leaf.size for leaf in flatten(tree).values())
