"""What a prompt is made of: examples before it, other instructions, and the form that training answers show."""

import json

import pytest

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import formats, rewrites, shots
from ftjax.evals.rewrites import UNCHANGED, Instruction, applied
from ftjax.evals.scored import Question
from ftjax.prompts import Prompt

SYSTEM = {"role": "system", "content": "Sort."}


def turn(text, role="user"):
    return {"role": role, "content": text}


def question(asked, answer="ok", system=True):
    before = [SYSTEM] * system + [turn(asked)]
    return Question(Prompt("x", {"messages": before}), {"messages": [*before, turn(answer, "assistant")]})


def test_examples_stand_before_the_question_as_turns_under_its_own_system_message():
    examples = [question("a", "1", system=False), question("b", "2")]
    made = shots.with_examples(question("c").prompt, examples, chat=True)
    turns = [SYSTEM, turn("a"), turn("1", "assistant"), turn("b"), turn("2", "assistant"), turn("c")]
    assert made.fields == {"messages": turns}
    plain = Question(Prompt("x", {"prompt": "c="}), {"messages": [turn("c="), turn("3", "assistant")]})
    assert shots.with_examples(plain.prompt, [question("a=", "1")], chat=True).fields["messages"][-1] == turn("c=")
    assert shots.with_examples(plain.prompt, [question("a=", "1"), question("b=", "2")], chat=False).fields == {
        "text": "a=1\n\nb=2\n\nc="
    }
    assert shots.with_examples(plain.prompt, [], chat=True) == plain.prompt


def test_a_held_out_question_is_never_among_its_own_examples(tmp_path):
    rows = [{"messages": [SYSTEM, turn(f"lamp {i}"), turn(str(i), "assistant")]} for i in range(9)]
    rows += [{"prompt": " Lamp  3", "completion": "3"}, {"text": "A lamp."}, {"prompt": "no answer", "completion": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.defaults()
    config.data.train, config.data.max_bad_rows = (str(tmp_path / "rows.jsonl"),), 5
    held = [question("lamp 3", system=False), question("LAMP 5")]
    found = [its.example["messages"][-2]["content"] for its in shots.training_questions(config, held)]
    assert sorted(found) == [f"lamp {i}" for i in range(9) if i not in (3, 5)]
    assert found == [its.example["messages"][-2]["content"] for its in shots.training_questions(config, held)]
    assert found != sorted(found)


def test_the_nearest_examples_are_those_with_the_rare_words_of_the_question():
    examples = [question(text) for text in ("the lamp is red", "the desk is red", "the lamp is cracked", "the cat")]
    found = shots.nearest(examples, [question("is the cracked lamp here"), question("zebra")], 2)
    assert [its.prompt.fields["messages"][-1]["content"] for its in found[0]] == [
        "the lamp is red",
        "the lamp is cracked",
    ]
    assert len(found[1]) == 2  # with nothing in common, any will do


def test_an_instruction_takes_the_place_of_the_system_message_or_comes_before_the_question():
    its = Instruction("{system} Briefly.", "\n\nNow.")
    assert applied(question("a").prompt, its).fields["messages"] == [
        turn("Sort. Briefly.", "system"),
        turn("a\n\nNow."),
    ]
    assert applied(question("a", system=False).prompt, its).fields["messages"] == [turn("Briefly.\n\na\n\nNow.")]
    assert applied(Prompt("x", {"prompt": "a"}), Instruction("Do.")).fields == {"prompt": "Do.\n\na"}
    assert applied(question("a").prompt, UNCHANGED) == question("a").prompt


def test_instructions_are_those_of_the_file_a_line_each(tmp_path):
    path = tmp_path / "tries.txt"
    path.write_text("{system} Only JSON.\n\nBe brief.\n")
    assert rewrites.of_file(path) == [Instruction("{system} Only JSON."), Instruction("Be brief.")]
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty; write an instruction on each line"):
        rewrites.of_file(path)
    with pytest.raises(UserError, match="no such file"):
        rewrites.of_file(tmp_path / "none.txt")


def test_the_search_spends_its_budget_on_the_better_ones():
    tried = [Instruction(name) for name in "abcd"]
    skill = {"c": (0.5, 1.0), "d": (0.5, 0.5), UNCHANGED.text: (0.25, 1.0)}
    asked = []

    def answer(rivals, which):
        asked.extend((rival.text, i) for rival in rivals for i in which)
        return [[skill.get(rival.text, (0.0, 1.0))] * len(which) for rival in rivals]

    found = rewrites.search(tried, 30, 40, answer)
    assert [its.instruction.text for its in found[:3]] == ["c", "d", UNCHANGED.text]  # of equal scores the valid one
    assert len(asked) == len(set(asked)) == sum(its.answers for its in found) <= 40
    assert found[0].answers > found[-1].answers
    assert found[0].score == 0.5
    skill.clear()
    assert rewrites.search(tried, 30, 40, answer)[0].instruction == UNCHANGED
    assert max(its.answers for its in rewrites.search(tried, 3, 400, answer)) == 3  # no more than there are
    with pytest.raises(UserError, match=r"--instruction_budget=4: 4 instructions and the prompt as it is"):
        rewrites.search(tried, 30, 4, answer)


@pytest.mark.parametrize(
    ("answers", "name", "valid", "invalid"),
    [
        (
            ['{"a":1,"b":"x"}', '{"b":"y","a":2}'],
            "a JSON object with the keys a and b",
            '{"a": null, "b": 1}',
            '{"a":1}',
        ),
        (
            ['{"a":1}', '{"a":1,"b":2}'],
            "a JSON object with the keys a and b (b may be missing)",
            '{"a":0}',
            '{"a":0,"c":1}',
        ),
        (["[1]", "[]"], "a JSON list", '["x"]', '{"a":1}'),
        (["12", "-3.5", "1,000"], "a number", " 7\n", "seven"),
        (["yes", "no", " no"] * 5, "one of no or yes", "yes ", "maybe"),
    ],
)
def test_the_form_of_answers(answers, name, valid, invalid):
    form = formats.of_answers(answers)
    assert form.name == name
    assert form.matches(valid)
    assert not form.matches(invalid)
    assert not form.matches("Here it is: " + valid)
    assert all(map(form.matches, answers))


def test_a_form_names_the_choices_and_what_has_none():
    rows = [json.dumps({"issue": issue, "order": f"{i}"}) for i, issue in enumerate(["late", "lost"] * 10)]
    assert formats.of_answers(rows).detail.endswith('{"issue": "late" or "lost", "order": text}')
    assert formats.of_answers(["a story", "another", "a third"]) is None
    assert formats.of_answers([]) is None
    assert not formats.of_answers(['{"a":1}'] * 3).matches('{"a":1,"a":2}')


def test_what_is_replayed_is_no_example_of_the_task(tmp_path):
    sources = []
    for name, count in (("task", 5), ("replayed", 50)):
        rows = [{"messages": [turn(f"{name} {i}"), turn(str(i), "assistant")]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"source": str(tmp_path / f"{name}.jsonl")} | ({"replay": 0.2} if name == "replayed" else {}))
    config = configs.defaults()
    config.data.train = tuple(sources)
    found = shots.training_questions(config, [])
    assert sorted(question.prompt.fields["messages"][-1]["content"] for question in found) == [
        f"task {i}" for i in range(5)
    ]
