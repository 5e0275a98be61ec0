"""What docs/hosted-chat.md shows runs, and what it says of limits is so."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from support.chatting import Names, application, serving, tiny

from ftjax.hosted import chat
from ftjax.hosted.generation import Generation, Limits

PAGE = (Path(__file__).parents[2] / "docs/hosted-chat.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_prints_an_answer(tmp_path):
    base, variables = tiny(tmp_path)
    made = Generation(base, variables, Limits(slots=1, places=1, rank=1, context=80))
    with serving(application(chat.routes(made, Names("ft:...", {})))) as url:
        printed, names = io.StringIO(), {}
        with contextlib.redirect_stdout(printed):
            exec(EXAMPLE.replace("http://127.0.0.1:8000", url), names)
        names["client"].close()
    made.close()
    assert printed.getvalue()


def test_every_limit_is_there_with_its_default():
    for field in dataclasses.fields(Limits):
        assert f"`{field.name}`" in PAGE
        if isinstance(field.default, int):
            assert f"`{field.name}` ({field.default:,})" in PAGE


def test_every_harmless_parameter_is_named():
    for name in chat.Chat.harmless.keys() - {"modalities", "parallel_tool_calls", "prompt_cache_retention"}:
        assert re.search(rf"`{name}\b", PAGE), name
