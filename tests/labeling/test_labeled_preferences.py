"""What labels come to: rows that training reads through its data pipeline, by the majority of the labelers."""

import json

import pytest
from support.chat_templates import CHATML, make_tokenizer
from support.labeling import make_pairs

from ftjax.data import pipeline
from ftjax.labeling import preferences
from ftjax.labeling.journal import Label


def labels_of(pairs, choices):
    return {
        pair.id: {who: Label(pair.id, who, choice, "a", 1.0, "") for who, choice in by.items()}
        for pair, by in zip(pairs, choices)
    }


CHOICES = [
    {"anna": "a"},
    {"anna": "b", "ben": "b", "carl": "tie"},
    {"anna": "tie"},
    {"anna": "a", "ben": "b"},
    {"anna": "skip"},
    {"anna": "skip", "ben": "a"},
    {"anna": "tie", "ben": "tie", "carl": "a"},
    {},
]


def test_the_majority_is_written_and_what_has_none_is_counted(tmp_path):
    pairs = make_pairs(tmp_path, prompts=9)
    outcome = preferences.export(tmp_path, pairs, labels_of(pairs, CHOICES))
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    texts = [pairs[i].texts for i in (0, 1, 5)]
    better = [(prompt, *(answers if i != 1 else answers[::-1])) for i, (prompt, *answers) in enumerate(texts)]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == better
    assert outcome[1:6] == (3, 2, 1, 1, 3)  # preferred, tied, undecided, skipped, disagreed on
    assert outcome.labelers == {"anna": 7, "ben": 4, "carl": 2}
    told = "\n".join(preferences.told(outcome, tmp_path))
    assert "7 pairs judged by anna (7), ben (4), carl (2)." in told
    assert f"3 preferences in {tmp_path / 'preferences.jsonl'}" in told
    assert "Left out: 2 tied, 1 undecided, 1 skipped." in told
    assert "3 pairs judged by several: 29% agreement (Krippendorff's alpha 0.00)" in told
    assert "3 disagreed on" in told


def test_training_reads_the_rows(tmp_path):
    pairs = make_pairs(tmp_path, prompts=9)
    preferences.export(tmp_path, pairs, labels_of(pairs, CHOICES))
    tokenizer = make_tokenizer(CHATML)
    spec = pipeline.DataSpec("pair", 400, 1, False, "assistant", len(tokenizer))
    examples = pipeline.read([{"source": str(tmp_path / "preferences.jsonl")}], tokenizer, spec)
    assert len(examples) == 3
    chosen, rejected = (tokenizer.decode(document.tokens[document.trained]) for document in examples[1].documents)
    _, a, b = pairs[1].texts
    assert (chosen, rejected) == (f"{b}<|im_end|>", f"{a}<|im_end|>")


def test_without_a_preference_there_is_no_file(tmp_path):
    pairs = make_pairs(tmp_path)
    preferences.export(tmp_path, pairs, labels_of(pairs, [{"anna": "a"}]))
    outcome = preferences.export(tmp_path, pairs, labels_of(pairs, [{"anna": "tie"}]))
    assert not (tmp_path / "preferences.jsonl").exists()
    assert preferences.told(outcome, tmp_path) == ["1 pair judged by anna (1).", "Left out: 1 tied."]
    assert preferences.told(preferences.export(tmp_path, pairs, {}), tmp_path) == ["Nothing is judged yet."]


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [("a", "a"), ("aab", "a"), ("ab", "undecided"), ("at", "undecided"), ("ttab", "tie"), ("s", "skip"), ("sb", "b")],
)
def test_verdicts(choices, wanted):
    names = {"t": "tie", "s": "skip"}
    labels = {str(i): Label("p", str(i), names.get(one, one), "a", 1.0, "") for i, one in enumerate(choices)}
    assert preferences.verdict(labels) == wanted
