"""What a person sees is what was written: no markup of the console's in paths and patterns."""

import pytest

from ftjax.training.display import Display


@pytest.mark.parametrize("text", ["runs/[a]/b", "self_attn[/](q|v)_proj", "[/]"])
def test_text_is_printed_as_it_is(capsys, text):
    with Display(every=1) as display:
        display.say(text)
        display.table("a table", {"targets": text})
        with display.counter(text, 2) as advance:
            advance(1)
    assert capsys.readouterr().out.count(text) == 2


def test_a_line_for_the_first_and_every_few_steps_without_a_terminal(capsys):
    with Display(every=5) as display:
        display.start_training(2, 12)
        for step in range(3, 13):
            display.step(step, {"loss": 1.5, "tokens_per_second": 100.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/12", "5/12", "10/12", "12/12"]
    assert "loss 1.5000" in lines[0]
    assert lines[-1].endswith("0:00:00 left")
