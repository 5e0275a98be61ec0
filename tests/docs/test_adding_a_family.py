"""The guide's worked example is the code that runs."""

import re
from pathlib import Path

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
