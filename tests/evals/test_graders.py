"""Graders in OpenAI's form: what each gives, what is wrong with one, and that no template or formula is code."""

import contextlib
import json
import time

import pytest
from nltk.translate.gleu_score import sentence_gleu
from support.endpoints import serving

from ftjax.errors import UserError
from ftjax.evals import formula, graders, placeholders, scores, similarity
from ftjax.evals.graders import Judges

ITEM = {"answer": "blue", "sizes": [{"w": 3}], "n": 2}
RIGHT = {
    "type": "string_check",
    "name": "right",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}

SIMILAR = {"type": "text_similarity", "name": "x", "input": "", "reference": "", "evaluation_metric": "gleu"}


def reward(grader, text, item=ITEM, judges=graders.NOBODY):
    return graders.grade(graders.check(grader, judges), text, item, judges)


@pytest.mark.parametrize(
    ("operation", "text", "expected"),
    [
        ("eq", "blue", 1), ("eq", "Blue", 0), ("ne", "Blue", 1), ("ne", "blue", 0),
        ("like", "sky blue", 1), ("like", "sky Blue", 0), ("ilike", "sky Blue", 1), ("ilike", "red", 0),
    ],
)  # fmt: skip
def test_a_string_check_compares(operation, text, expected):
    assert reward(RIGHT | {"operation": operation}, text) == graders.Grade(expected, {"right": expected}, {})


def test_placeholders_are_values_and_nothing_else():
    values = {"item": ITEM | {"trap": "{{ item.answer }}"}, "sample": {"output_json": {"a": [1, "x"]}}}
    assert placeholders.fill("{{item.sizes[0].w}} {{ sample.output_json.a }}", values) == '3 [1, "x"]'
    assert placeholders.fill("{{ item.trap }}", values) == "{{ item.answer }}"
    for template in (
        "{{ item.a() }}",
        "{{ 1 + 1 }}",
        "{{ item['a'] }}",
        "{{ item.a | upper }}",
        "{{ }}",
        "{{ __x__.y z }}",
    ):
        with pytest.raises(UserError, match="no name of a value"):
            placeholders.fill(template, values)
    for template in ("{{ item.__class__ }}", "{{ item.sizes[1] }}", "{{ item.answer.upper }}"):
        with pytest.raises(placeholders.Absent):
            placeholders.fill(template, values)


def test_placeholders_of_strangers_take_neither_time_nor_memory():
    began = time.process_time()
    assert placeholders.fill("{{" * 500_000, {}) == "{{" * 500_000
    assert time.process_time() - began < 5
    with pytest.raises(UserError, match="has more than 16,777,216 characters"):
        placeholders.fill("{{ item.long }}" * 500, {"item": {"long": "x" * 100_000}})
    with pytest.raises(placeholders.Absent):
        placeholders.fill(f"{{{{ item.sizes[{'0' * 5000}] }}}}", {"item": ITEM})


def test_a_sample_that_is_no_json_is_worth_nothing_and_a_row_without_a_field_is_a_mistake():
    grader = RIGHT | {"input": "{{ sample.output_json.color }}"}
    assert reward(grader, '{"color": "blue"}').reward == 1
    graded = reward(grader, "blue")
    assert (graded.reward, list(graded.errors)) == (0, ["sample_parse_error"])
    with pytest.raises(UserError, match=r"item.answer }} is not there: the row has the fields \['x'\]"):
        reward(RIGHT, "blue", {"x": 1})


@pytest.mark.parametrize(
    ("text", "reference"), [("kitten", "sitting"), ("", "a"), ("", ""), ("same", "same"), ("ab", "ba")]
)
def test_fuzzy_match_is_the_ratio_of_the_longest_common_subsequence(text, reference):
    lengths = [[0] * (len(reference) + 1) for _ in range(len(text) + 1)]
    for i, a in enumerate(text):
        for j, b in enumerate(reference):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    both = len(text) + len(reference)
    assert similarity.fuzzy_match(text, reference) == (2 * lengths[-1][-1] / both if both else 1.0)


def test_gleu_is_nltks():
    texts = "the cat sat on the mat", "a cat sat on a mat today", "the the the", "no"
    for text in texts:
        for reference in texts:
            expected = sentence_gleu([reference.split()], text.split())
            assert similarity.gleu(text, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", similarity.METRICS)
def test_similarities_are_one_for_the_same_and_less_for_others(metric):
    if metric.startswith(("rouge", "bleu")):
        pytest.importorskip("sacrebleu")
    grader = RIGHT | {"type": "text_similarity", "evaluation_metric": metric}
    grader.pop("operation")
    same, item = "one two three four five six", {"answer": "one two three four five six"}
    assert reward(grader, same, item).reward == pytest.approx(1)
    assert 0 < reward(grader, "one two three four five nine", item).reward < 1


def test_a_python_grader_runs_apart():
    grader = {
        "type": "python",
        "name": "length",
        "source": "def grade(sample, item):\n    return item['n'] / len(sample['output_text'])",
    }
    assert reward(grader, "abcd").reward == 0.5
    graded = reward(grader, "")
    assert graded.reward == 0
    assert graded.errors == {"python_grader_runtime_error": "ZeroDivisionError: division by zero"}


def test_a_model_gives_a_number_within_its_range():
    grader = {
        "type": "score_model",
        "name": "kind",
        "model": "big",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Is {{ sample.output_text }} kind?"}]}],
        "range": [1, 5],
        "sampling_params": {"temperature": 0.5, "max_completions_tokens": 7},
    }
    replies = iter(["I say: 4", "9", "none"])
    with serving(lambda body: {"message": {"content": next(replies)}}) as judge:
        judges = Judges(judge.url)
        assert reward(grader, "he", judges=judges).reward == 4
        assert reward(grader, "she", judges=judges).reward == 5
        assert list(reward(grader, "it", judges=judges).errors) == ["model_grader_parse_error"]
    assert judge.asked[0]["messages"][0] == {"role": "user", "content": "Is he kind?"}
    assert (judge.asked[0]["model"], judge.asked[0]["temperature"], judge.asked[0]["max_completion_tokens"]) == (
        "big",
        0.5,
        7,
    )
    with pytest.raises(UserError, match="not served here: no endpoint"):
        graders.check(grader)


def test_a_multi_grader_weighs_others():
    part = RIGHT | {"name": "part", "operation": "like"}
    grader = {
        "type": "multi",
        "name": "both",
        "graders": {"a": RIGHT, "b": part},
        "calculate_output": "0.25 * a + 0.75 * b",
    }
    assert reward(grader, "so blue") == graders.Grade(0.75, {"a": 0.0, "b": 1.0}, {})
    with pytest.raises(UserError, match="names 'c'"):
        graders.check(grader | {"calculate_output": "a + c"})
    with pytest.raises(UserError, match="cannot hold another"):
        graders.check(grader | {"graders": {"a": grader}})


@pytest.mark.parametrize(
    ("text", "value"),
    [("2 * a - b / 4", 5.5), ("min(a, b, 1)", 1), ("a ^ 2", 9), ("-a + abs(-b)", -1), ("sqrt(a + 1)", 2)],
)
def test_formulas_are_arithmetic(text, value):
    assert formula.value(text, {"a": 3, "b": 2}) == value


@pytest.mark.parametrize(
    "text", ["a.b", "__import__('os')", "a if b else 0", "[a][0]", "(lambda: a)()", "'x'", "a = 1", "", "min()", "True"]
)
def test_formulas_are_nothing_else(text):
    with pytest.raises(UserError):
        formula.names(text)


@pytest.mark.parametrize("text", ["a / 0", "9 ^ 9 ^ 9", "log(0)", "1e400 - 1e400"])
def test_formulas_without_a_value_say_so(text):
    with pytest.raises(UserError, match=r"has no value|is (nan|inf)"):
        formula.value(text, {"a": 3})


@pytest.mark.parametrize(
    ("grader", "said"),
    [
        ([], "is an object"), ({"type": "label_model"}, "no type of graders 'label_model'"),
        ({"type": "python", "name": "x"}, "needs 'source'"), (RIGHT | {"operation": "is"}, "operation is 'is'"),
        (RIGHT | {"inputs": ""}, "has no 'inputs'"), (RIGHT | {"input": "{{ row.x }}"}, "`item` and `sample`"),
        ({"type": "python", "name": "x", "source": "def g("}, "is not Python"),
        ({"type": "python", "name": "x", "source": "x = 1"}, "no function grade"),
        (SIMILAR | {"evaluation_metric": "cosine"}, "embeddings"), (SIMILAR | {"input": 1}, "must be text"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_grader_is_said(grader, said):
    with pytest.raises(UserError, match=said):
        graders.check(grader)


def test_a_config_names_a_grader_by_its_file(tmp_path):
    file = tmp_path / "right.json"
    file.write_text(json.dumps(RIGHT))
    score = scores.find(f"grader:{file}", "config.objective.rewards")
    assert score.function("blue", ITEM) == 1.0
    score.check(ITEM)
    with pytest.raises(UserError, match=r"item\.answer"):
        score.check({"messages": []})
    file.write_text("{}")
    with pytest.raises(UserError, match=r"config.objective.rewards: grader .*right.json: there is no type"):
        scores.find(f"grader:{file}", "config.objective.rewards")


def test_whatever_a_description_holds_is_a_grader_or_a_mistake():
    judged = {
        "type": "score_model",
        "name": "x",
        "model": "m",
        "input": [{"role": "user", "content": "?"}],
        "range": [0, 1],
    }
    python = {"type": "python", "name": "x", "source": "def grade(sample, item): return 1"}
    multi = {"type": "multi", "name": "x", "graders": {"a": RIGHT, "b": SIMILAR}, "calculate_output": "a + b"}
    odd = (
        None,
        True,
        0,
        -1,
        10**400,
        "",
        "{{",
        "{{ }}",
        "-" * 999 + "1",
        "\ud800",
        [],
        [None],
        {},
        {"a": 1},
        {"type": []},
    )
    for given in (RIGHT, SIMILAR, judged, python, multi):
        for key in given:
            for value in odd:
                for made in (given | {key: value}, multi | {"graders": {"a": given | {key: value}}}):
                    with contextlib.suppress(UserError):
                        graders.check(made, Judges("http://here"))
