"""scripts/preferences.py: its table against figures computed by hand; what it measures takes long and is slow."""

import json
import runpy

import numpy as np
import pytest
from support import ROOT

from ftjax.data.format.example import Document
from ftjax.data.format.formats import check_row
from ftjax.method import method_of
from ftjax.tasks import support_preference

SCRIPT = ROOT / "scripts/preferences.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(SCRIPT.parent))
        yield runpy.run_path(str(SCRIPT))


def record(name, chosen, rejected, tickets, general, **more):
    found = {"chosen": chosen, "rejected": rejected, "tickets": tickets, "general": general}
    return {"name": name, "steps": 24, "seconds": 90, "cpu_seconds": 150} | found | more


# Pairs in the order of support_preference.FAULTS: wrong, verbose, wrong, both.
START = record(
    "SFT",
    [-1, -2, -3, -4],
    [-2, -1, -2, -1],
    [0, 1, 0, 1] * 5,
    [3.0, 2.0],
    general_before=[2.5, 2.0],
    where="1 x cpu",
    own=[-3, -1],
)
DPO = record("DPO", [-1, -2, -3, -4], [-5, -9, -2, -6], [1, 1, 0, 1] * 5, [3.5, 2.0], own=[2, -1])
REWARD = {"name": "reward model", "steps": 48, "cpu_seconds": 60, "chosen": [2, 3, 4, 5], "rejected": [0, 1, 1, 2]}


def rows(drawn):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in drawn.splitlines()]


def test_the_table_has_shares_differences_and_intervals(script):
    heads, dashes, start, dpo, reward, _, below = rows(script["table"]([START, DPO, REWARD]))
    assert below == ["4 pairs and 20 tickets; 1 x cpu."]
    assert {len(cells) for cells in (dashes, start, dpo, reward)} == {len(heads)}
    of = lambda cells: dict(zip(heads, cells))  # noqa: E731
    assert of(start)["the better answer is likelier"] == "25%"
    assert of(dpo)["the better answer is likelier"] == "75%"
    assert (of(start)["where both are terse"], of(dpo)["where both are terse"]) == ("50%", "50%")
    # Differences are 1, -1, -1, -3 before, and 4, 7, -1, 2 after.
    assert (of(start)["more so than before"], of(dpo)["more so than before"]) == ("", "75%, +4.0")
    assert of(start)["likelier than its own mistake"] == "0% of 2"
    assert of(dpo)["likelier than its own mistake"] == "50% of 2"
    assert of(start)["tickets right"].startswith("50 % [")
    assert (of(start)["against SFT"], of(dpo)["against SFT"][:4]) == ("", "+25 ")
    assert (of(start)["general text"], of(dpo)["general text"]) == ("+0.250", "+0.500")
    assert of(dpo)["CPU minutes"] == "2"
    assert reward[4:] == ["100%", "100%", "2.5 (rewards)", "", "", "", ""]


def test_what_is_finished_is_not_measured_again_and_the_table_goes_to_the_page(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (DPO, DPO | {"steps": 7}, START)))
    (tmp_path / "preferences.md").write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    main = script["main"]
    monkeypatch.setattr("pages.DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["preferences.py", f"--out={tmp_path}", "--only=DPO", "--write"])
    main()
    page = (tmp_path / "preferences.md").read_text()
    before, drawn, after = page.partition("<!-- measured -->\n")[0], *page.split("<!-- measured -->\n")[1].split("<!--")
    assert (before, after) == ("before\n", " end -->\nafter\n")
    assert drawn in capsys.readouterr().out
    assert [cells[0] for cells in rows(drawn)[2:-2]] == ["SFT", "DPO"]
    assert rows(drawn)[3][2] == "7"  # of what was measured twice the last


def test_every_variant_is_a_run_that_its_method_takes(script, tmp_path):
    for name, variant in script["VARIANTS"].items():
        config = script["config_of"](variant, tmp_path, script["Sizes"]())
        assert method_of(config).rows in ("conversation", "pair", "labeled", "ranked")
        assert (config.adapter.source != "") == (name != script["START"])


def test_an_answer_is_measured_after_its_prompt_with_the_token_that_ends_it(script):
    trained = np.array([0, 0, 0, 1, 1, 1, 0], bool)
    context, continuation = script["item"](Document(np.arange(10, 17), trained))
    assert (context.tolist(), continuation.tolist()) == ([10, 11, 12], [13, 14, 15])


def test_the_page_has_the_table_of_the_script(script):
    page = (ROOT / "docs/preferences.md").read_text()
    drawn = page.split("<!-- measured -->\n")[1].split("<!-- end -->")[0]
    heads, _, *others = (cells for cells in rows(drawn) if len(cells) > 1)
    assert heads == rows(script["table"]([]))[0]
    names = [cells[0] for cells in others]
    assert names == [name for name in script["VARIANTS"] if name in names]
    assert names[0] == script["START"]


@pytest.mark.slow
def test_a_run_is_trained_and_measured(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["p", f"--out={tmp_path}", "--only=DPO", "--pairs=4", "--tickets=2", "--steps=1"])
    script["main"]()
    start, dpo = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert len(dpo["chosen"]) == 4
    assert dpo["chosen"] != start["chosen"]
    assert start["steps"] == dpo["steps"] == 1
    row = check_row(support_preference.test_examples(1)[0], "")
    assert len(row.fields["chosen"]) == 1
