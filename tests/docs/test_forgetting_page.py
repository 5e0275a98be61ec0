"""What docs/forgetting.md shows of the function runs as it stands there."""

import re
from pathlib import Path

import pytest
from support.runs import command, finish, write_run

PAGE = Path(__file__).parents[2] / "docs/forgetting.md"


@pytest.mark.slow
def test_the_example_measures_a_run(tmp_path, capsys):
    workdir = tmp_path / "run"
    steps = ("--config.steps=4", "--config.data.eval=()")
    finish(command("ftjax.train", "--config", str(write_run(tmp_path)), "--workdir", str(workdir), *steps))
    (example,) = re.findall(r"```python forgetting\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"WORKDIR": workdir}
    exec(example, names)
    assert re.match(r"general text: [+-]\d\.\d{3} nats per token \[", capsys.readouterr().out)
    found = names["found"]
    assert [its["name"] for its in found["abilities"]] == ["multiple choice", "instructions"]
    assert len(found["drift"]) == 2
    assert found["drift"][0]["relative"] > 0
