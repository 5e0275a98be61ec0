"""The table at the start of a run."""

from ftjax import describe


def test_rows_that_were_skipped_are_in_the_table():
    report = {"examples": 1200, "tokens": 90, "trained_tokens": 40, "longest": 9, "truncated": 1, "dropped": 2}
    report |= {"split": 0, "divided": 0, "bad_rows": 0}
    whole = "1,200 examples, 90 tokens, 40 of them trained; longest 9, truncated 1, dropped 2"
    assert describe.counted(report) == whole
    assert describe.counted(report | {"bad_rows": 3}) == whole + ", bad rows skipped 3"
    split = whole.replace("examples,", "examples (each answer of 7 rows is one),")
    assert describe.counted(report | {"split": 7}) == split


def test_long_texts_that_go_on_are_in_the_table():
    report = {"examples": 200, "tokens": 180200, "trained_tokens": 180000, "longest": 3601, "split": 0}
    counted = describe.counted(report | {"truncated": 0, "dropped": 0, "divided": 50, "further": 150, "bad_rows": 0})
    assert counted.endswith("dropped 0; 50 long texts go on in 150 further documents")
