"""Questions with choices: rows as data sets have them, and the choice that transformers finds likeliest."""

import collections

import numpy as np
import pytest
import torch
from support.chat_templates import CHATML, make_tokenizer
from support.tiny import CONFIG, numpy_params, spec
from support.witness import torch_llama

from ftjax.errors import UserError
from ftjax.evals import multiple_choice
from ftjax.evals.multiple_choice import Question, question_of
from ftjax.models.decoder import Decoder

CHOICES = ["red", "blue and green", "brown"]


@pytest.mark.parametrize(
    "fields",
    [
        {"choices": CHOICES, "answer": 1},
        {"choices": CHOICES, "answer": "1"},
        {"choices": CHOICES, "answer": "B"},
        {"choices": CHOICES, "answer": "blue and green"},
        {"choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"choices": {"text": CHOICES, "label": [1, 2, 3]}, "answerKey": 2},
    ],
)
def test_rows_as_data_sets_have_them(fields):
    assert question_of({"question": "Which?", **fields}, "x.jsonl:3") == Question("Which?", tuple(CHOICES), 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"choices": CHOICES}, "x.jsonl:3: a question with choices has .*this row has .'choices', 'question'"),
        ({"choices": ["one"], "answer": 0}, "a list of two strings or more"),
        ({"choices": CHOICES, "answer": 3}, "x.jsonl:3: the answer 3 is none of the 3 choices"),
        ({"choices": CHOICES, "answer": "D"}, "the answer 'D' is none of the 3 choices"),
    ],
)
def test_rows_that_are_no_such_questions_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        question_of({"question": "Which?", **fields}, "x.jsonl:3")


def test_the_choice_is_the_one_that_transformers_finds_likeliest():
    tokenizer, model = make_tokenizer(CHATML), Decoder(spec(vocab_size=400))
    params = numpy_params(model)
    witness = torch_llama(CONFIG | {"vocab_size": 400}, params)
    asked = [Question(text, tuple(CHOICES), 0) for text in ("The lamp?", "What?", "A dog is")]
    chosen = multiple_choice.choose(model, {"params": params}, tokenizer, asked)
    for i, question in enumerate(asked):
        totals = []
        for choice in CHOICES:
            before, whole = (
                tokenizer(f"Question: {question.text}\nAnswer:{more}")["input_ids"] for more in ("", f" {choice}")
            )
            with torch.no_grad():
                logps = torch.log_softmax(witness(torch.tensor([whole])).logits[0].double(), -1)
            totals.append(sum(float(logps[at - 1, whole[at]]) for at in range(len(before), len(whole))))
        np.testing.assert_allclose([one.total for one in chosen.likelihoods[i]], totals, atol=1e-4)
        assert chosen.by_sum[i] == np.argmax(totals)
        assert chosen.by_bytes[i] == np.argmax(np.array(totals) / [len(choice) for choice in CHOICES])
    assert {*chosen.by_sum} != {*chosen.by_bytes}  # or the two could not be told apart


def test_blanks_before_a_continuation_belong_to_it():
    tokenizer = make_tokenizer(CHATML)
    context, continuation = multiple_choice.split("The lamp: ", "red", tokenizer)
    assert tokenizer.decode(context) == "The lamp:"
    assert tokenizer.decode(continuation) == " red"


def test_what_ships_has_four_choices_and_the_right_one_everywhere_alike():
    questions = multiple_choice.read([multiple_choice.SHIPPED])
    assert len({question.text for question in questions}) == len(questions) == 60
    assert collections.Counter(question.answer for question in questions) == dict.fromkeys(range(4), 15)
    assert all(len(set(question.choices)) == 4 for question in questions)
