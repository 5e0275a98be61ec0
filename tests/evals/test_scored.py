"""What of data.eval is answered and scored, and what a score is told of it."""

import json

import pytest

from ftjax import config as configs
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError
from ftjax.evals import scored
from ftjax.evals.entries import metric_names
from ftjax.tasks import support_ticket

TASK = "task:support_ticket"
TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def sets(*entries):
    config = configs.defaults()
    config.data.eval = entries
    return scored.scored_sets(config)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(fields):
    return fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]


@pytest.mark.parametrize("options", [{}, {"split": "test[:10]"}, {"limit": 7}, {"split": "train[-50:]", "limit": 5}])
def test_a_task_is_scored_on_the_rows_that_reading_its_entry_gives(options):
    (found,) = sets({"source": TASK, **options})
    rows = read_sources([{"source": TASK, "split": "test", **options}])
    assert [question.example["messages"] for question in found.questions] == [row.fields["messages"] for row in rows]
    assert len(rows) == options.get("limit", 10 if "split" in options else len(support_ticket.test_examples()))
    assert found.grade(found.questions[0].expected, found.questions[0]) == 1.0
    assert found.grade("no ticket", found.questions[0]) == 0.0
    split = options.get("split")
    assert found.metric == f"eval_support_ticket{f'[{split}]' if split else ''}/score"


@pytest.mark.parametrize("options", [{"format": "messages"}, {"weight": 2.0}])
def test_options_that_scoring_does_not_know_are_refused(options):
    with pytest.raises(UserError, match=f"task:support_ticket is scored, which knows no '{next(iter(options))}'"):
        sets({"source": TASK, **options})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "2 + 2?", "output": "4"},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    ],
    ids=lambda row: "-".join(row),
)
def test_any_row_is_a_question_with_its_expected_answer(tmp_path, row):
    (found,) = sets({"source": write(tmp_path / "sums.v2.jsonl", row | {"level": 3}), "score": "exact"})
    (question,) = found.questions
    assert found.metric == "eval_sums/exact"
    assert (asked(question.prompt.fields), question.expected) == (TURNS[:1], "4")
    assert question.prompt.origin == f"{tmp_path}/sums.v2.jsonl:1"
    assert question.example["level"] == 3  # what a function of one's own may need
    assert question.example["messages"] == TURNS
    assert (found.grade(" 4\n", question), found.grade("5", question)) == (1.0, 0.0)


def test_a_conversation_is_asked_for_its_last_answer(tmp_path):
    turns = [*TURNS, {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"}]
    (found,) = sets({"source": write(tmp_path / "sums.jsonl", {"messages": turns}), "score": "exact"})
    assert (found.questions[0].prompt.fields["messages"], found.questions[0].expected) == (turns[:3], "6")


OWN = """
def words(completion, example):
    return len(completion.split()) / example["most"]

def nothing(completion, example):
    return None

def fails(completion, example):
    raise KeyError("colour")

def leaves(completion, example):
    raise SystemExit(0)
"""


def test_a_function_of_ones_own_scores_rows_without_answers(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "asked.jsonl", {"prompt": "Say it.", "most": 4}, {"messages": TURNS[:1], "most": 2})
    (found,) = sets({"source": path, "score": "own_scores:words"})
    assert found.metric == "eval_asked/words"
    assert [found.grade("one two", question) for question in found.questions] == [0.5, 1.0]
    assert [question.expected for question in found.questions] == ["", ""]
    (found,) = sets({"source": path, "score": "own_scores:nothing"})
    with pytest.raises(
        UserError, match=r"asked.jsonl:1: nothing of 'x': the score is None; it must be a finite number"
    ):
        found.grade("x", found.questions[0])
    (found,) = sets({"source": path, "score": "own_scores:fails"})
    with pytest.raises(UserError, match=r"asked.jsonl:1: fails: KeyError: 'colour'; the completion was 'x'"):
        found.grade("x", found.questions[0])
    (found,) = sets({"source": path, "score": "own_scores:leaves"})
    with pytest.raises(UserError, match=r"asked.jsonl:1: leaves: SystemExit: 0; the completion was 'x'"):
        found.grade("x", found.questions[0])
    with pytest.raises(UserError, match=r"asked.jsonl:1: has no answer in words, with which the score 'exact'"):
        sets({"source": path, "score": "exact"})
    with pytest.raises(UserError, match="own_scores has no function 'wrods'"):
        sets({"source": path, "score": "own_scores:wrods"})
    with pytest.raises(UserError, match="No module named 'no_such'; is no_such where Python finds modules"):
        sets({"source": path, "score": "no_such:words"})


def test_what_cannot_be_scored_is_refused_with_its_place(tmp_path):
    text = write(tmp_path / "text.jsonl", {"text": "Once upon a time"})
    with pytest.raises(UserError, match=r"text.jsonl:1: is text, which asks nothing"):
        sets({"source": text, "score": "exact"})
    with pytest.raises(UserError, match=r"there is no score 'exactly'; did you mean 'exact'"):
        sets({"source": TASK, "score": "exactly"})
    with pytest.raises(UserError, match=r"two entries would be recorded as those of support_ticket"):
        sets(TASK, {"source": TASK, "limit": 3})
    config = configs.defaults()
    config.data.train = ({"source": text, "score": "exact"},)
    with pytest.raises(UserError, match=r"config.data.train: .* a score is for data.eval"):
        configs.sources(config, "train")


def test_a_tool_call_is_no_answer_in_words(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = write(tmp_path / "tools.jsonl", {"messages": turns})
    with pytest.raises(UserError, match=r"tools.jsonl:1: has no answer in words, with which the score 'exact'"):
        sets({"source": path, "score": "exact"})


def test_names_that_the_records_could_not_tell_apart_are_refused(tmp_path):
    path = write(tmp_path / "sums.jsonl", {"prompt": "2 + 2?", "completion": "4"})
    with pytest.raises(UserError, match=r"two entries would be recorded as those of sums; give a file one score"):
        sets({"source": path, "score": "exact"}, {"source": path, "score": "f1"})
    general = write(tmp_path / "general.jsonl", {"prompt": "2 + 2?", "completion": "4"})
    with pytest.raises(UserError, match=r"eval_general/... are the metrics of general text"):
        sets({"source": general, "score": "exact"})


def test_the_first_score_of_data_eval_decides():
    config = configs.defaults()
    quiz, sums = {"source": "quiz.jsonl", "score": "multiple_choice"}, {"source": "sums.jsonl", "score": "f1"}
    for entries, first in (((quiz, sums), "eval_quiz/multiple_choice"), ((sums, quiz), "eval_sums/f1")):
        config.data.eval = ("rows.jsonl", {"source": "texts.jsonl", "score": "perplexity"}, *entries)
        assert metric_names(config)[0] == first
