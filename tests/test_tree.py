"""Trees addressed by paths."""

import doctest

import numpy as np
import pytest

from ftjax import tree
from ftjax.errors import UserError

TREE = {"params": {"norm": {"scale": 1}, "embed": {"kernel": 2}}, "lora": {"embed": {"lora_a": 3}}}


def test_the_docstring_example_runs():
    results = doctest.testmod(tree)
    assert results.attempted > 0
    assert results.failed == 0


def test_flatten_is_sorted_and_unflatten_is_its_inverse():
    leaves = tree.flatten(TREE)
    assert list(leaves) == ["lora/embed/lora_a", "params/embed/kernel", "params/norm/scale"]
    assert tree.unflatten(leaves) == TREE


def test_combine_is_the_inverse_of_partition():
    chosen, rest = tree.partition(TREE, lambda path: path.startswith("lora/"))
    assert chosen == {"lora": TREE["lora"]}
    assert rest == {"params": TREE["params"]}
    assert tree.combine(chosen, rest) == TREE
    everything, nothing = tree.partition(TREE, lambda path: True)
    assert (everything, nothing) == (TREE, {})
    assert tree.combine(everything, nothing) == TREE


def test_a_path_on_both_sides_is_an_error():
    with pytest.raises(ValueError, match="params/norm/scale"):
        tree.combine(TREE, {"params": {"norm": {"scale": 5}}})


def test_matching_searches_and_refuses_a_pattern_that_finds_nothing():
    paths = list(tree.flatten(TREE))
    assert tree.matching("embed", paths, "trainable") == ["lora/embed/lora_a", "params/embed/kernel"]
    assert tree.matching("scale$", paths, "trainable") == ["params/norm/scale"]
    with pytest.raises(UserError, match=r"trainable='q_proj'.*params/norm/scale"):
        tree.matching("q_proj", paths, "trainable")
    with pytest.raises(UserError, match=r"trainable='\(' is not a regular expression"):
        tree.matching("(", paths, "trainable")


def test_count_adds_up_elements():
    assert tree.count({"a": np.zeros((2, 3)), "b": {"c": np.zeros(4), "d": np.zeros(())}}) == 11
