"""Constitutions, which are files of principles, and examples of critiques and revisions by them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from ftjax.errors import UserError, did_you_mean
from ftjax.labeling.draws import draw

SHIPPED = Path(__file__).parent / "constitution.yaml"
SHIPPED_EXAMPLES = Path(__file__).parent / "examples.yaml"


class Principle(NamedTuple):
    """What answers are to be like.

    Attributes:
      name: which principle it is, for people.
      critique: a request to say how an answer breaks it.
      revise: a request to rewrite the answer so that it keeps it.
      prefer: the question which of the answers (A) and (B) keeps it better.
    """

    name: str
    critique: str
    revise: str
    prefer: str


class Example(NamedTuple):
    """An answer that breaks the principle of that name, a critique which says how, and a revision that keeps it."""

    principle: str
    prompt: str
    answer: str
    critique: str
    revision: str


def read(path: Path = SHIPPED) -> list[Principle]:
    """The principles of a YAML file, a list of them.

    Raises:
      UserError: with the file, the principle and the fix.
    """
    found = _read(path, "principle", Principle, lambda entry: entry.get("name"))
    names = [principle.name for principle in found]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"{path}: two principles have the name {twice!r}; give one of them another name")
    return found


def read_examples(path: Path, constitution: Sequence[Principle]) -> list[Example]:
    """The examples of a YAML file, a list of them.

    Raises:
      UserError: with the file, the example and the fix; one is of a principle that the constitution lacks.
    """
    found, names = _read(path, "example", Example, lambda entry: None), [principle.name for principle in constitution]
    for number, example in enumerate(found, 1):
        if example.principle not in names:
            raise UserError(
                f"{path}: example {number}: the constitution has no principle {example.principle!r}"
                f"{did_you_mean(example.principle, names)}; it has {', '.join(names)}"
            )
    return found


def drawn(constitution: Sequence[Principle], count: int, seed: int, *names: str) -> list[Principle]:
    """`count` different principles in an order that follows from the seed and the names; all, if they are fewer."""
    return sorted(constitution, key=lambda principle: draw(seed, *names, principle.name))[:count]


def shown(examples: Sequence[Example], principle: Principle, count: int) -> list[Example]:
    """The examples to show before a request by `principle`: at most `count`, those of its own last, where they count
    most."""
    ranked = sorted(examples, key=lambda example: example.principle == principle.name)  # stable
    return ranked[len(ranked) - min(count, len(ranked)) :]


Entry = TypeVar("Entry", Principle, Example)


def _read(path: Path, what: str, kind: type[Entry], name_of: Callable[[dict], object]) -> list[Entry]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({error.problem}); correct it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: must be a list with at least one {what}, each beginning with `- `")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}: {what} {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}; write the fields {', '.join(kind._fields)}")
        if isinstance(name := name_of(entry), str):
            where += f" ({name})"
        if unknown := next((key for key in entry if key not in kind._fields), None):
            raise UserError(
                f"{where} has a field {unknown!r}{did_you_mean(str(unknown), kind._fields)}; the fields are "
                f"{', '.join(kind._fields)}"
            )
        for field in kind._fields:
            value = entry.get(field)
            if value is None:
                raise UserError(f"{where} has no `{field}`; add it")
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where}: {field} is {value!r}; write text, in quotes where YAML reads something else")
        found.append(kind(**{field: entry[field].strip() for field in kind._fields}))
    return found
