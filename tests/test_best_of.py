"""The best of several completions: which one it is, what rewards see, and the command that writes it."""

import json

import pytest
from support.runs import command, finish, write_model, write_rows

from ftjax.best_of import Best, best, questions_of
from ftjax.errors import UserError
from ftjax.evals import scores


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 3)


def test_the_best_completion_of_each_question_is_taken_and_of_equal_ones_the_first(tmp_path):
    lines = ["The blue lamp", "The red lamp"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    rewarded = questions_of(str(tmp_path / "prompts.txt"), "support.rewards:of_e", run_code=False)
    assert [question.example["messages"][0]["content"] for question in rewarded.questions] == lines
    chosen = best(rewarded, ["none", "eve", "tea", "abc", "e", "ee"], 3)
    assert chosen == [Best("eve", pytest.approx(2 / 3)), Best("e", 1.0)]


def test_rewards_see_the_answer_of_a_row(rows):
    rewarded = questions_of(str(rows), "exact", run_code=False)
    answers = [question.expected for question in rewarded.questions]
    assert all(answer.startswith("send ") for answer in answers)
    texts = [text for answer in answers for text in ("no", answer)]
    assert best(rewarded, texts, 2) == [Best(answer, 1.0) for answer in answers]


def test_rewards_that_cannot_judge_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("The blue lamp\n")
    with pytest.raises(UserError, match=r"prompts.txt:1: has no answer in words"):
        questions_of(str(tmp_path / "prompts.txt"), "exact", run_code=False)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The blue lamp"}) + "\n")
    with pytest.raises(UserError, match=r"texts.jsonl:1: is text to be continued"):
        questions_of(str(tmp_path / "texts.jsonl"), "exact", run_code=False)
    assert scores.find("python", "").runs_code
    with pytest.raises(UserError, match=r"--reward python runs what the model writes.*--run_code"):
        questions_of(str(tmp_path / "prompts.txt"), "python", run_code=False)


@pytest.mark.slow
def test_the_command_writes_the_best_with_its_reward(tmp_path, rows):
    given = ("ftjax.generate", f"--model={write_model(tmp_path / 'model')}", f"--prompts={rows}")
    given += ("--max_new_tokens=8", f"--out={tmp_path / 'out.jsonl'}")
    finish(command(*given, "--best_of=4", "--reward=f1", "--temperature=1"))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(row) for row in written] == [["prompt", "completion", "reward"]] * 3
    for row, asked in zip(written, map(json.loads, rows.read_text().splitlines()), strict=True):
        question, answer = (turn["content"] for turn in asked["messages"])
        assert row["prompt"] == question
        assert row["reward"] == scores.find("f1", "").function(row["completion"], {"messages": [{"content": answer}]})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--best_of=4", "--reward=f1"), "--best_of goes with --prompts and --out"),  # at temperature 0
        (("--best_of=4", "--temperature=1"), "--best_of goes with --prompts and --out"),
        (("--reward=f1",), "--reward and --run_code choose among several"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, rows, flags, said):
    given = ("ftjax.generate", "--model=m", f"--prompts={rows}", f"--out={tmp_path / 'out.jsonl'}")
    assert said in finish(command(*given, *flags), status=2)
