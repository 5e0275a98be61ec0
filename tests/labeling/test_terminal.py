"""Labeling in the terminal: what is shown, typed and kept."""

import io

import pytest
from rich.console import Console
from support.labeling import make_pairs, session_of

from ftjax.labeling import terminal


def run(root, pairs, typed, width=120):
    """(what was shown, the labels) of an input that ends after what is typed."""
    session, kept = session_of(root, pairs)
    out, words = Console(file=io.StringIO(), width=width, highlight=False), iter(typed)

    def ask(question):
        word = next(words, None)
        if word is None:
            raise EOFError
        return word

    terminal.label(session, "anna", "Which is [better]?", out, ask)
    return out.file.getvalue(), [kept.labels.get(pair.id, {}).get("anna") for pair in pairs]


def test_words_are_judgements(tmp_path):
    pairs = make_pairs(tmp_path, prompts=5)
    shown, labels = run(tmp_path, pairs, ["u", "T", "u", "1", "what?", " 2 ", "skip", "q"])
    assert [label and (label.choice == label.left, label.choice) for label in labels[3:]] == [None, None]
    assert labels[0].choice == labels[0].left
    assert labels[1].choice not in (labels[1].left, "tie", "skip")
    assert labels[2].choice == "skip"
    assert "Which is [better]?" in shown
    assert "There is nothing to undo." in shown
    assert "4 of 5" in shown
    shown, labels = run(tmp_path, pairs, ["tie"])  # goes on, and ends with the input
    assert labels[3].choice == "tie"


@pytest.mark.parametrize("width", [60, 120])
def test_answers_stand_side_by_side_where_there_is_room_and_command_no_terminal(tmp_path, width):
    shown, _ = run(tmp_path, make_pairs(tmp_path), [], width)
    titles = [line for line in shown.splitlines() if "answer 1" in line]
    assert ["answer 2" in line for line in titles] == [width == 120]
    assert "Where is order 0?" in shown
    assert "[U+001B]" in shown
    assert "\x1b" not in shown
    assert "<script>" in shown
    assert max(map(len, shown.splitlines())) <= width
