"""The pages for those who come from TRL or Axolotl: their tables are that of the code, and their config is read."""

import re

import pytest
from support import ROOT

from ftjax import config as configs
from ftjax import config_files, foreign
from ftjax.foreign import Ours

PAGES = {name: (ROOT / f"docs/from-{name}.md").read_text() for name in ("trl", "axolotl")}


@pytest.mark.parametrize(("page", "table"), [("trl", foreign.TRL), ("axolotl", foreign.AXOLOTL)])
def test_the_tables_are_the_table_of_the_code(page, table):
    found = {}
    for names, *key, note in re.findall(r"^\| (`.+?`) \|(?: `([\w.]+)` \|)? (.*?) ?\|$", PAGES[page], re.MULTILINE):
        found |= {name: Ours(key[0], note) for name in re.findall(r"`(\w+)`", names)}
    assert found == table


@pytest.mark.parametrize(("page", "name"), [("from-trl", "mine.yaml"), ("running", "config.yaml")])
def test_the_config_of_the_page_is_one(tmp_path, page, name):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)[1]
    (tmp_path / name).write_text(text)
    config = config_files.load(str(tmp_path / name))
    configs.validate(config)
    assert config.optimizer.learning_rate in (1e-4, 2e-4)
