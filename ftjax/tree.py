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
    """{path: leaf} -> nested dict."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def by_module(tree: Tree) -> dict[str, dict[str, Any]]:
    """{"layers/mlp/up_proj": {"lora_a": its A, ...}}: the leaves under the path of what they belong to."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(tree).items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = leaf
    return modules


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree by path into (chosen, rest).

    >>> partition({"a": {"b": 1, "c": 2}}, lambda path: path == "a/b")
    ({'a': {'b': 1}}, {'a': {'c': 2}})
    """
    picked, rest = {}, {}
    for path, leaf in flatten(tree).items():
        (picked if chosen(path) else rest)[path] = leaf
    return unflatten(picked), unflatten(rest)


def combine(a: Tree, b: Tree) -> Tree:
    """The inverse of `partition`; ValueError for a path on both sides."""
    left, right = flatten(a), flatten(b)
    if both := left.keys() & right.keys():
        raise ValueError(f"paths on both sides: {sorted(both)[:5]}")
    return unflatten(left | right)


def matching(pattern: str, paths: list[str], key: str) -> list[str]:
    """The paths in which `re.search` finds `pattern`; if there are none, UserError that names the config `key`."""
    try:
        matches = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise UserError(f"{key}={pattern!r} is not a regular expression: {error}") from error
    if not matches:
        raise UserError(f"{key}={pattern!r} matches no parameter. Parameters are named like: {', '.join(paths[:12])}")
    return matches


def count(tree: Tree) -> int:
    """The number of elements in all leaves (anything with a `.size`)."""
    return sum(leaf.size for leaf in flatten(tree).values())
