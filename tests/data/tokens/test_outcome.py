"""What becomes of a row: trained on as one example or several, dropped, bad, or on the other side of the hold-out."""

import json

import pytest
from support.chat_templates import CHATML, make_tokenizer

from ftjax.data.read.sources import read_sources
from ftjax.data.tokens.outcome import TokenRules, outcome
from ftjax.errors import SourceError

CHAT = [{"role": "user", "content": "The red lamp"}, {"role": "assistant", "content": "send red"}]
RULES = TokenRules(max_length=24, vocab_size=None, train_on="assistant", kind="conversation", long_text="divide")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHATML)


@pytest.fixture
def written(tmp_path):
    def write(*rows, **options):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path, read_sources([{"source": str(path)}], **options)

    return write


def test_a_row_is_trained_on_as_one_example(written, tokenizer):
    found = outcome(written({"messages": CHAT})[1], 0, tokenizer, RULES._replace(max_length=99))
    (example,) = found.examples
    assert (found.bad, found.dropped, found.split, found.divided, found.unanswered) == ("", "", False, False, False)
    assert found.longest == len(example.tokens)
    assert example.trained.any()


def test_a_long_text_is_divided_or_cut(written, tokenizer):
    rows = written({"text": "The red lamp is broken. " * 10})[1]
    whole, cut = (outcome(rows, 0, tokenizer, RULES._replace(long_text=how)) for how in ("divide", "cut"))
    assert whole.divided
    assert not cut.divided
    assert whole.longest == cut.longest > 24 == len(cut.examples[0].tokens)
    # Each further document begins with the last token of the one before, and every token but the first is learned.
    assert sum(int(example.trained.sum()) for example in whole.examples) == whole.longest - 1


def test_why_a_row_gives_no_example(written, tokenizer):
    silent = [CHAT[0], CHAT[1] | {"weight": 0}]
    far = [CHAT[0] | {"content": "lamp " * 40}, CHAT[1]]
    _, rows = written({"messages": silent}, {"messages": far}, {"messages": []})
    unweighted, cut_off, bad = (outcome(rows, i, tokenizer, RULES) for i in range(3))
    assert (unweighted.dropped, unweighted.parts) == ("weight 0", ())
    assert cut_off.dropped == f"{cut_off.longest} tokens"
    assert bad.bad.startswith(rows.origin(2))
    assert not any(found.examples for found in (unweighted, cut_off, bad))


def test_a_row_held_out_is_none_and_a_changed_file_ends_the_run(written, tokenizer):
    path, rows = written({"messages": CHAT}, holdout=0.5)
    sides = []
    for heldout in (True, False):
        side = read_sources([{"source": str(path)}], holdout=0.5, heldout_side=heldout)
        sides.append(outcome(side, 0, tokenizer, RULES))
    assert [side is None for side in sides].count(True) == 1
    path.write_text(json.dumps({"messages": CHAT[:1]}) + "\n")
    with pytest.raises(SourceError):
        outcome(rows, 0, tokenizer, RULES)
