"""The table at the start of a run."""

from ftjax import describe


def test_rows_that_were_skipped_are_in_the_table():
    report = {"examples": 1200, "tokens": 90, "trained_tokens": 40, "longest": 9, "truncated": 1, "dropped": 2}
    report |= {"split": 0, "bad_rows": 0}
    whole = "1,200 examples, 90 tokens, 40 of them trained; longest 9, truncated 1, dropped 2"
    assert describe.counted(report) == whole
    assert describe.counted(report | {"bad_rows": 3}) == whole + ", bad rows skipped 3"
    split = whole.replace("examples,", "examples (each answer of 7 rows is one),")
    assert describe.counted(report | {"split": 7}) == split
