"""The hold-out: a function of the prompt alone, so that no prompt is on both sides."""

import random

import pytest

from ftjax.data.format.formats import check_row
from ftjax.data.read.holdout import held_out, prompt_key


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def prompts(n):
    words = ["why", "does", "rain", "fall", "on", "one", "hill", "and", "not", "the", "next"]
    random.seed(5)
    return [f"{i} " + " ".join(random.choices(words, k=6)) for i in range(n)]


def rows_of(prompt):
    """Rows with this prompt in every format that has one, with various answers."""
    system = []
    answers = [assistant("Yes."), assistant("No.")]
    return [
        {"prompt": prompt, "completion": "Perhaps."},
        {"prompt": prompt, "completion": "Certainly not."},
        {"messages": [*system, user(prompt), answers[0]]},
        {"messages": [user(prompt), answers[1], user("And then?"), answers[0]]},
        {"prompt": [user(prompt)], "completion": [answers[0]]},
        {"prompt": [user(prompt)], "chosen": [answers[0]], "rejected": [answers[1]]},
        {"prompt": [user(prompt)], "completion": [answers[1]], "label": False},
        {"prompt": f"  {prompt.upper()}\n", "completion": "Even so."},
    ]


def test_all_rows_of_one_prompt_are_on_one_side_whatever_the_answer_and_the_format():
    sides = set()
    for prompt in prompts(200):
        records = [check_row(row, "row").fields for row in rows_of(prompt)]
        found = {held_out(fields, 0.5) for fields in records}
        assert len(found) == 1, prompt
        sides |= found
    assert sides == {False, True}


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_the_share_of_prompts_is_held_out(share):
    n = 5000
    found = sum(held_out({"prompt": prompt, "completion": "c"}, share) for prompt in prompts(n))
    assert abs(found - share * n) <= 4 * (n * share * (1 - share)) ** 0.5


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    for prompt in prompts(500):
        fields = {"text": prompt}
        assert not held_out(fields, 0.1) or held_out(fields, 0.3)


def test_what_makes_another_prompt():
    base = {"messages": [user("Hi"), assistant("Hello")]}
    same = [
        {"messages": [user(" hi\n"), assistant("Bye")]},
        {"messages": [user("ＨＩ"), assistant("Bye")]},
        {"prompt": "Hi", "completion": "x"},
    ]
    other = [
        {"messages": [user("Ho"), assistant("Hello")]},
        {"messages": [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello")]},
        {"messages": [user("Hi"), user("there"), assistant("Hello")]},
        {"messages": [assistant("Welcome"), user("Hi"), assistant("Hello")]},
        {"messages": [assistant("Go away"), user("Hi"), assistant("Hello")]},
        {"text": "Once"},
    ]
    assert {prompt_key(fields) for fields in same} == {prompt_key(base)}
    assert len({prompt_key(fields) for fields in [base, *other]}) == 1 + len(other)


@pytest.mark.parametrize("before", [[{"role": "system", "content": "Be kind."}], []])
def test_a_greeting_after_the_system_prompt_is_part_of_the_prompt(before):
    rows = [{"messages": [*before, assistant("Welcome!"), user(f"Question {i}"), assistant("Yes")]} for i in range(300)]
    assert len({prompt_key(row) for row in rows}) == 300
    assert 30 < sum(held_out(row, 0.3) for row in rows) < 150


def test_where_only_the_system_prompt_asks_its_answers_stay_together():
    system = {"role": "system", "content": "Write a line."}
    keys = {prompt_key({"messages": [system, assistant(text)]}) for text in ("One", "Two")}
    assert len(keys) == 1
