"""The page on labeling: its commands and keys are those of the code."""

import re
import shlex

from support import ROOT

from ftjax import config as configs
from ftjax.label import Options
from ftjax.labeling import journal, preferences

PAGE = (ROOT / "docs/labeling.md").read_text()


def test_every_flag_key_and_field_of_the_page_is_there():
    commands = [shlex.split(line)[2:] for line in re.findall(r"^ {4}(python -m ftjax.+)$", PAGE, re.MULTILINE)]
    used = {
        word.removeprefix("--")
        for name, *words in commands
        if name == "ftjax.label"
        for word in words
        if word[:2] == "--"
    }
    named = set(re.findall(r"`--(\w+)", PAGE))
    assert used | named <= {*Options._fields}
    assert len(used | named) > 12
    keys = {word for words in commands for word in re.findall(r"--config\.([\w.]+)=", " ".join(words))}
    assert keys <= configs.KEYS.keys()
    script = (ROOT / "ftjax/labeling/label.js").read_text()
    for key in re.findall(r"`(\S)`", PAGE.split("| key | |")[1].split("\n\n")[0]):
        assert {"←": "ArrowLeft", "→": "ArrowRight"}.get(key, key) in re.search("KEYS = {(.*)}", script)[1]
    line = next(line for line in PAGE.splitlines() if line.startswith("| `labels.jsonl`"))
    assert {*re.findall(r"`(\w+)`", line)} >= {*journal.Label._fields, journal.UNDO, "a", "b", "tie", "skip"}
    assert f"`{preferences.FILE}`" in PAGE
