"""What is marked between two texts, and that nothing of them is lost."""

import numpy as np
import pytest

from ftjax.reporting.differences import differences


def differing(pieces):
    return [text for text, differs in pieces if differs]


@pytest.mark.parametrize(
    ("before", "after", "old", "new"),
    [
        ("the blue lamp", "the red lamp", [" blue"], [" red"]),
        ("same", "same", [], []),
        ("the blue lamp", "the blue lamp please", [], [" please"]),
        ("", "new", [], ["new"]),
        ('{"order":"3","n":2}', '{"order":"3","n":5}', ["2"], ["5"]),
        ("私は猫が好き", "私は犬が好き", ["猫"], ["犬"]),
        ("हिन्दी में", "हिन्दी है", [" में"], [" है"]),  # vowel signs stay with their letters
        ("one two three four", "vier drei zwei eins", ["one two three four"], ["vier drei zwei eins"]),
    ],
)
def test_words_that_differ_are_marked(before, after, old, new):
    marked = differences(before, after)
    assert [differing(pieces) for pieces in marked] == [old, new]


def test_the_pieces_are_the_texts_whatever_they_hold():
    rng = np.random.default_rng(0)
    letters = list('ab  \n"{},.é猫\u202e🙂')
    for _ in range(200):
        before, after = ("".join(rng.choice(letters, rng.integers(0, 40))) for _ in range(2))
        old, new = differences(before, after)
        assert "".join(text for text, _ in old) == before
        assert "".join(text for text, _ in new) == after
        same = ["".join(text for text, differs in pieces if not differs) for pieces in (old, new)]
        assert same[0] == same[1]


def test_long_texts_are_compared_by_their_ends_alone():
    words = " ".join(map(str, range(3000)))
    old, new = differences(f"start {words} end", f"start {words[::-1]} end")
    assert differing(old) == [f" {words}"]
    assert [text for text, differs in new if not differs] == ["start", " end"]
