"""Texts with {{ sample.output_text }} and {{ item.answer }}: values in the places of their names, and nothing else.

No code is evaluated: a placeholder is a name, members of it and indices of lists, `{{ item.answers[0].text }}`. What
stands in a value is never read as a placeholder.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ftjax.errors import UserError

_MOST = 2**24  # characters of a text with its values: a placeholder may stand there often, and its value be long
_PATH = re.compile(r"[A-Za-z_]\w*(\.[\w-]+|\[\d+\])*")
_STEP = re.compile(r"[\w-]+")


class Absent(UserError):
    """A value that a placeholder names is not there. `name`: of the placeholder."""

    def __init__(self, name: str):
        super().__init__(f"{{{{ {name} }}}} is not there")
        self.name = name


def names(template: str) -> list[str]:
    """What its placeholders name; UserError for one that is more than a name."""
    found = [name for _, name, _ in _places(template)]
    for name in found:
        if not _PATH.fullmatch(name):
            raise UserError(f"{{{{ {name} }}}} is no name of a value, such as item.answer or sample.output_text")
    return found


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The text with its values: strings as they are, everything else as JSON.

    Raises:
      UserError: a placeholder is more than a name, or the text grows too long; Absent: a value is not there.
    """
    names(template)
    parts, end, length = [], 0, 0
    for start, name, after in _places(template):
        parts += [template[end:start], _text(find(name, values))]
        end, length = after, length + sum(map(len, parts[-2:]))
        if length > _MOST:
            raise UserError(f"the text with its values has more than {_MOST:,} characters; use fewer, or shorter ones")
    return "".join([*parts, template[end:]])


def find(name: str, values: Mapping[str, Any]) -> Any:
    """The value that a placeholder names; Absent where it is not there."""
    value: Any = values
    for step in _STEP.findall(name):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
            value = value[int(step)]
        else:
            raise Absent(name)
    return value


def _places(template: str) -> Iterator[tuple[int, str, int]]:
    """(where it begins, its name, where it ends) of each placeholder, read once over: templates are strangers'."""
    end = 0
    while (start := template.find("{{", end)) >= 0 and (close := template.find("}}", start + 2)) >= 0:
        end = close + 2
        yield start, template[start + 2 : close].strip(), end


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
