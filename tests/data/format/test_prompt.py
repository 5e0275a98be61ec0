"""What a row of each format asks, with its answer or without one."""

import pytest

from ftjax.data.format.prompt import prompt_of
from ftjax.errors import UserError

USER, SYSTEM = {"role": "user", "content": "Why?"}, {"role": "system", "content": "Be brief."}
ANSWER, MORE = {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}
TOOL = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, {"messages": [SYSTEM, USER]}),
        ({"messages": [USER, ANSWER, MORE, ANSWER]}, {"messages": [USER, ANSWER, MORE]}),
        ({"messages": [USER], "tools": [TOOL]}, {"messages": [USER], "tools": [TOOL]}),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, {"messages": [SYSTEM, USER]}),
        ({"conversations": [HUMAN]}, {"messages": [USER]}),
        ({"prompt": "Why?"}, {"prompt": "Why?"}),
        ({"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "Why?"}),
        ({"prompt": "Why?", "system": "Be brief."}, {"messages": [SYSTEM, USER]}),
        ({"prompt": [USER], "completion": [ANSWER]}, {"messages": [USER]}),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, {"prompt": "Why?"}),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}, {"messages": [USER]}),
        ({"instruction": "Why?"}, {"messages": [USER]}),
        (
            {"instruction": "Add", "input": "1, 2", "output": "3"},
            {"messages": [{"role": "user", "content": "Add\n1, 2"}]},
        ),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER]}, {"messages": [USER]}),
        ({"text": "Once upon"}, {"text": "Once upon"}),
    ],
)
def test_a_row_of_each_format_without_its_answer(fields, asked):
    assert prompt_of(fields, "rows.jsonl:1") == asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "rows.jsonl:1: prompt is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "rows.jsonl:1"),
        ({"messages": [SYSTEM]}, "rows.jsonl:1: has no turn of the user to answer"),
        ({"question": "Why?"}, r"rows.jsonl:1: holds no prompt: it has the fields \['question'\]"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_with_its_place(fields, message):
    with pytest.raises(UserError, match=message):
        prompt_of(fields, "rows.jsonl:1")
