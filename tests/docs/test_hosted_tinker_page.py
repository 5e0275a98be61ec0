"""The page on Tinker's client: its script runs as it stands, and its limits are those of the code."""

import gc
import re

import pytest
from support import ROOT
from support.hosted import hosted
from support.runs import write_model

from ftjax.hosted import settings
from ftjax.hosted.tinker import losses, sampling

PAGE = (ROOT / "docs/hosted-tinker.md").read_text()


# The client leaves connections open.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_script_of_the_page(tmp_path, capsys):
    (script,) = re.findall(r"```python tinker\n(.*?)```", PAGE, re.DOTALL)
    sizes = {"model.dtype": "float32", "model.param_dtype": "float32", "generation.slots": 2}
    model = {"model.source": str(write_model(tmp_path / "model")), "generation.max_length": 64}
    with hosted(tmp_path / "serve", **model, **sizes) as server:
        exec(script.replace("http://127.0.0.1:8000", server.url).replace("KEY", repr(server.key("anna"))), {})
    gc.collect()
    first, *_, last, said = capsys.readouterr().out.splitlines()
    assert float(last.split()[1]) < float(first.split()[1])
    assert len(eval(said)) == 2


def test_the_limits_of_the_page():
    for key, value in re.findall(r"`config\.(tinker\.\w+)` \(([\d,]+)\)", PAGE):
        assert settings.KEYS[key].default == int(value.replace(",", ""))
    assert set(re.findall(r"config\.(tinker\.\w+)", PAGE)) <= settings.KEYS.keys()
    for name in losses.LOSSES:
        assert f"`{name}`" in PAGE
    assert (sampling.PASSING, sampling.LIKELIEST) == (8, 20)
