"""The count of a model's FLOPs against products counted one by one."""

from ftjax.planning import flops


def test_pairs_of_a_row_counted_one_by_one():
    for length, window in [(7, None), (7, 3), (7, 7), (7, 100), (1, 1)]:
        pairs = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
        assert flops.visible_pairs(length, window) == pairs
