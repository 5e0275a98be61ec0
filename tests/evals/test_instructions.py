"""The form of an answer is checked as a person would."""

import pytest

from ftjax.errors import UserError
from ftjax.evals import instructions
from ftjax.evals.instructions import Instruction, follows

# check -> value, answers that have the form, answers that have not
ANSWERS = {
    "words": (3, ["wide blue salt", " wide blue salt.\n"], ["wide blue", ""]),
    "at_most_words": (2, ["one two"], ["one two three", ""]),
    "one_of": (["yes", "no"], ["yes", " no\n"], ["Yes", "yes."]),
    "json_keys": (["a", "b"], ['{"b": 1, "a": 2}'], ['{"a": 1}', "[]", "a and b", '```{"a": 1, "b": 2}```']),
    "json_list": (2, ['["x", "y"]'], ['["x"]', '{"x": "y"}', "x, y"]),
    "upper": (True, ["HELLO!"], ["Hello", "12"]),
    "lower": (True, ["trees are tall."], ["Trees", "12"]),
    "bullets": (2, ["- a\n- b", "- a\n\n- b"], ["- a", "* a\n* b", "Sure:\n- a\n- b"]),
    "begins_with": ("Certainly", ["Certainly, Mars"], ["Mars, certainly"]),
    "ends_with": ("?", ["Why?\n"], ["Why? Because."]),
    "contains": ("lantern", ["A Lantern shone."], ["A lamp shone."]),
    "without": ("z", ["A dog."], ["A lazy dog", "Zebra", ""]),
    "digits": (True, ["13"], ["13.", "thirteen"]),
    "commas": (3, ["May, June, July"], ["May, June", "May,, July"]),
}


@pytest.mark.parametrize("check", instructions.CHECKS)
def test_an_answer_has_the_form_or_has_not(check):
    value, right, wrong = ANSWERS[check]
    instruction = Instruction("Do so.", check, value)
    assert [follows(answer, instruction) for answer in right] == [True] * len(right)
    assert [follows(answer, instruction) for answer in wrong] == [False] * len(wrong)


def test_what_ships_has_checks_that_there_are():
    shipped = instructions.shipped()
    assert len({one.prompt for one in shipped}) == 24
    assert {one.check for one in shipped} == instructions.CHECKS.keys()
    with pytest.raises(UserError, match=r"there is no check 'wrds'; did you mean 'words'\?"):
        follows("x", Instruction("Do so.", "wrds", 1))
