"""What a config names as MODULE:NAME: a person's own function or class, where Python finds modules."""

import importlib
from collections.abc import Callable
from typing import Any

from ftjax.errors import UserError


def find(name: str, what: str) -> Callable[..., Any]:
    """The function or class that MODULE:NAME names; UserError, which says `what` that is, where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"{what} {name!r}: {error}; is {module} where Python finds modules?") from error
    except (Exception, SystemExit) as error:  # a person's own module may raise anything
        raise UserError(f"{what} {name!r}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{what} {name!r}: {module} has no function {function!r}")
    return found
