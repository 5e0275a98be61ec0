"""Graders tried and checked by OpenAI's client, and reinforcement jobs that are rewarded by them."""

import json

import openai
import pytest
from support.plain_hosted import application, client_of, served

from ftjax.errors import UserError
from ftjax.evals.graders import NOBODY
from ftjax.hosted.jobs import grading, trial

RIGHT = {
    "type": "string_check",
    "name": "right",
    "input": "{{ sample.output_json.color }}",
    "reference": "{{ item.answer }}",
    "operation": "eq",
}
SHORT = {
    "type": "python",
    "name": "short",
    "source": "def grade(sample, item):\n    return 1 / len(sample['output_text'])",
}


@pytest.fixture(scope="module")
def client():
    with served(application(grading.routes(NOBODY))) as url, client_of(url) as client:
        yield client


def test_a_grader_is_tried_on_an_answer(client):
    grader = {"type": "multi", "name": "both", "graders": {"right": RIGHT, "short": SHORT}}
    grader["calculate_output"] = "right + 10 * short"
    text = '{"color": "blue"}'
    found = client.fine_tuning.alpha.graders.run(grader=grader, model_sample=text, item={"answer": "blue"})
    assert found.reward == pytest.approx(1 + 10 / len(text))
    assert found.sub_rewards == {"right": 1.0, "short": pytest.approx(1 / len(text))}
    assert (found.metadata.name, found.metadata.type) == ("both", "multi")
    assert found.metadata.scores == found.sub_rewards
    assert found.metadata.execution_time > 0
    assert not any(value for value in found.metadata.errors.to_dict().values())


def test_an_answer_that_cannot_be_graded_is_worth_nothing_and_says_why(client):
    run = client.fine_tuning.alpha.graders.run
    found = run(grader=RIGHT, model_sample="blue", item={"answer": "blue"})
    assert (found.reward, found.metadata.errors.sample_parse_error) == (0, True)
    found = run(grader=SHORT, model_sample="")
    assert (found.reward, found.metadata.errors.python_grader_runtime_error) == (0, True)
    assert found.metadata.errors.python_grader_runtime_error_details == "ZeroDivisionError: division by zero"


def test_a_grader_that_names_what_a_row_lacks_is_refused(client):
    with pytest.raises(openai.BadRequestError, match=r"item\.answer }} is not there") as caught:
        client.fine_tuning.alpha.graders.run(grader=RIGHT, model_sample='{"color": 1}', item={"a": 1})
    assert caught.value.param == "item"


def test_a_grader_is_checked(client):
    found = client.fine_tuning.alpha.graders.validate(grader=RIGHT)
    assert found.grader.to_dict() == RIGHT
    with pytest.raises(openai.BadRequestError, match="operation is 'is'") as caught:
        client.fine_tuning.alpha.graders.validate(grader=RIGHT | {"operation": "is"})
    assert (caught.value.param, caught.value.code) == ("grader", "invalid_grader")
    judge = {"type": "score_model", "name": "x", "model": "m", "input": [{"role": "user", "content": "?"}]}
    with pytest.raises(openai.BadRequestError, match="not served here"):
        client.fine_tuning.alpha.graders.validate(grader=judge)


def test_a_python_grader_does_not_see_the_server(client):
    source = "def grade(sample, item):\n    raise ValueError(open('/proc/self/environ').read())"
    found = client.fine_tuning.alpha.graders.run(grader=SHORT | {"source": source}, model_sample="x")
    assert "Permission denied" in found.metadata.errors.python_grader_runtime_error_details
    assert json.dumps(found.to_dict()).count("PATH=") == 0


def test_a_grader_that_takes_long_is_ended_and_the_server_goes_on(client):
    grader = {"type": "text_similarity", "name": "x", "evaluation_metric": "rouge_l"}
    grader |= {"input": "{{ sample.output_text }}", "reference": "{{ item.answer }}"}
    with pytest.raises(UserError, match="longer than 1 s of a processor"):
        trial.grade(grader, "a " * 100_000, {"answer": "a " * 100_000}, NOBODY, cpu_seconds=1)
    found = client.fine_tuning.alpha.graders.run(grader=grader, model_sample="a b", item={"answer": "a b"})
    assert found.reward == 1


def test_a_value_that_would_fill_the_memory_is_refused(client):
    grader = RIGHT | {"input": "{{ sample.output_text }}" * 10_000}
    with pytest.raises(openai.BadRequestError, match="more than 16,777,216 characters"):
        client.fine_tuning.alpha.graders.run(grader=grader, model_sample="x" * 100_000, item={"answer": ""})
