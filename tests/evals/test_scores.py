"""Scores by name, held against SQuAD's script, the papers' formulas and counts by hand."""

import json
import sys

import pytest

from ftjax import config as configs
from ftjax.errors import UserError
from ftjax.evals import scored, text_scores
from ftjax.evals.scores import SCORES


def score(name, completion, answer):
    example = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
    return SCORES[name].function(completion, example)


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("The cat sat on a mat.", "a cat sat on the mat", 1.0),
        ("It was in 1912, I think", "1912", 2 * (1 / 6 * 1) / (1 / 6 + 1)),  # precision 1/6, recall 1
        ("an Apple, an apple; THE apple!", "apple pie", 2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2)),  # a word counts once
        ("Zürich (Switzerland)", "the city of Zürich", 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3)),
        ("theory of a-the", "theory of athe", 1.0),  # punctuation goes before articles, and articles as words only
        ("no", "yes", 0.0),
        ("the", "A", 1.0),
        ("", "something", 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_the_words_precision_and_recall(completion, answer, value):
    assert score("f1", completion, answer) == pytest.approx(value, abs=1e-12)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "police kill gunman" against "police killed the gunman": 2 words in order, of 3 and of 4 (Lin 2004, section 3.1)
    assert score("rouge_l", "Police kill gunman", "police killed the gunman.") == pytest.approx(2 * 2 / (3 + 4))
    assert score("rouge_l", "the gunman killed police", "police killed the gunman") == pytest.approx(2 * 2 / (4 + 4))


def test_chrf_is_the_mean_over_lengths_of_n_grams():
    # of "abc" and "abd": 2 of 3 characters, 1 of 2 pairs, 0 of 1 triples; precision and recall are equal
    assert score("chrf", "abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert score("chrf", "東京", "東京") == 1.0


JSON_CASES = [
    ('{"b": ["x", 2], "a": {"c": null}}', 1.0),
    (' {"a": {"c": null}, "b": ["x", 3]}\n', 2 / 3),
    ('{"a": {"c": null}, "b": ["x", "2"]}', 2 / 3),  # types count
    ('{"a": {"c": null}, "b": ["x", 2.0]}', 2 / 3),
    ('{"a": {"c": false}, "b": ["x", 2]}', 2 / 3),
    ('{"a": {"c": null}, "b": [2, "x"]}', 1 / 3),
    ('{"a": {"c": null}}', 1 / 3),  # missing
    ('{"a": {"c": null}, "b": ["x", 2], "d": {}}', 3 / 4),  # too many
    ("[]", 0.0),
    ('{"a": {"c": null}, "a": {"c": null}, "b": ["x", 2]}', None),
    ('```json\n{"a": {"c": null}, "b": ["x", 2]}\n```', None),
    ('{"a": NaN}', None),
    ("[" * 100_000, None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "share"), JSON_CASES, ids=range(len(JSON_CASES)))
def test_json_counts_the_fields_of_both(completion, share):
    answer = '{"a": {"c": null}, "b": ["x", 2]}'
    assert score("json", completion, answer) == pytest.approx(share or 0.0)
    assert score("json_exact", completion, answer) == float(share == 1.0)
    assert SCORES["json"].valid(completion, {}) is SCORES["json_exact"].valid(completion, {}) is (share is not None)


def read(tmp_path, name, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    config = configs.defaults()
    config.data.eval = ({"source": str(path), "score": name},)
    return scored.scored_sets(config)


@pytest.mark.parametrize(
    ("name", "answer", "wanted"),
    [("json", "{'a': 1}", "the score compares JSON"), ("rouge_l", "東京です", "use 'chrf' for others")],
)
def test_an_answer_that_a_score_cannot_read_is_refused_with_its_row(tmp_path, name, answer, wanted):
    good = {"prompt": "?", "completion": '{"a": 1}'}
    read(tmp_path, name, good)
    with pytest.raises(
        UserError, match=rf"rows.jsonl:2: score '{name}': its own answer .* scores 0, not 1: .*{wanted}"
    ):
        read(tmp_path, name, good, {"prompt": "?", "completion": answer})


@pytest.mark.parametrize(("name", "package"), [("rouge_l", "rouge_score.rouge_scorer"), ("chrf", "sacrebleu.metrics")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    for scorer in (text_scores._rouge_scorer, text_scores._chrf_scorer):
        monkeypatch.setattr(text_scores, scorer.__name__, scorer.__wrapped__)  # which keep nothing
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"'{name}' needs a further package; pip install 'ftjax\[scores\]'"):
        read(tmp_path, name, {"prompt": "?", "completion": "yes"})
