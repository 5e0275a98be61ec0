"""The guide's worked example is the code that runs."""

import dataclasses
import re
from pathlib import Path

from ftjax.models.spec import Experts

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs/adding-a-family.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_the_example_is_the_file_the_registry_and_the_test_config():
    whole, registry, tests = BLOCKS
    assert whole == (ROOT / "ftjax/models/families/olmo2.py").read_text()
    assert registry in (ROOT / "ftjax/models/families/__init__.py").read_text()
    configs = "".join((ROOT / f"tests/support/{name}.py").read_text() for name in ("family_configs", "more_configs"))
    assert all(line + "\n" in configs for line in tests.splitlines())


def test_the_guide_is_short():
    assert len(GUIDE.splitlines()) < 100


def test_every_family_is_under_a_hundred_lines_and_every_field_is_in_the_guide():
    files = sorted((ROOT / "ftjax/models/families").glob("*.py"))
    assert len(files) > 8
    families = [path for path in files if path.name not in ("__init__.py", "fields.py")]
    assert max(len(path.read_text().splitlines()) for path in families) < 100
    spec = (ROOT / "ftjax/models/spec.py").read_text().split("class DecoderSpec")[1]
    switches = re.findall(r"^    (\w+):.* = ", spec, re.MULTILINE)
    assert len(switches) > 15
    assert [name for name in switches if f"`{name}`" not in GUIDE and name not in ("hidden_act",)] == []


def test_every_field_of_experts_is_on_the_page_of_mixtures():
    page = (ROOT / "docs/mixtures-and-hybrids.md").read_text()
    fields = [field.name for field in dataclasses.fields(Experts)]
    assert len(fields) > 10
    assert [name for name in fields if f"`{name}`" not in page and f"`{name}=" not in page] == []


def test_the_files_and_modules_that_the_page_of_mixtures_names_are_there():
    page = (ROOT / "docs/mixtures-and-hybrids.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", page))
    assert len(named) > 10
    places = ("", "ftjax/", "ftjax/models/", "ftjax/models/families/")
    assert [name for name in named if not any((ROOT / place / name).is_file() for place in places)] == []
