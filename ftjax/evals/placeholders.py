"""Texts with {{ sample.output_text }} and {{ item.answer }}: values in the places of their names, and nothing else.

No code is evaluated: a placeholder is a name, members of it and indices of lists, `{{ item.answers[0].text }}`. What
stands in a value is never read as a placeholder.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ftjax.errors import UserError

_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"[A-Za-z_]\w*(\.[\w-]+|\[\d+\])*")
_STEP = re.compile(r"[\w-]+")


class Absent(UserError):
    """A value that a placeholder names is not there. `name`: of the placeholder."""

    def __init__(self, name: str):
        super().__init__(f"{{{{ {name} }}}} is not there")
        self.name = name


def names(template: str) -> list[str]:
    """What its placeholders name; UserError for one that is more than a name."""
    found = [match.strip() for match in _PLACE.findall(template)]
    for name in found:
        if not _PATH.fullmatch(name):
            raise UserError(f"{{{{ {name} }}}} is no name of a value, such as item.answer or sample.output_text")
    return found


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The text with its values: strings as they are, everything else as JSON; Absent for one that is not there."""
    names(template)
    return _PLACE.sub(lambda match: _text(find(match[1].strip(), values)), template)


def find(name: str, values: Mapping[str, Any]) -> Any:
    """The value that a placeholder names; Absent where it is not there."""
    value: Any = values
    for step in _STEP.findall(name):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise Absent(name)
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
