"""What --config may name: a config that ships, or a file in Python, YAML or JSON.

A Python file builds the whole config in `get_config()`. YAML and JSON hold only what differs from the defaults, nested
in sections or under dotted names; the config.json of a run is such a file.
"""

import ast
import json
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

import ftjax
from ftjax import config as configs
from ftjax import strict_json
from ftjax.config import Key
from ftjax.errors import UserError, did_you_mean


def load(name: str, keys: Mapping[str, Key] = configs.KEYS) -> ConfigDict:
    """The config that --config names: "chat", "configs/chat.py", "mine.py:argument", "mine.yaml", "runs/x/config.json".

    keys: those that it may have.

    Raises:
      UserError: there is none of that name, or it cannot be read, with the file and the line.
    """
    path, argument = find(name)
    if path.suffix == ".py":
        return _from_python(path, argument, keys)
    if path.suffix in (".yaml", ".yml"):
        return _from_values(_yaml_values(path, keys), keys)
    if path.suffix == ".json":
        chosen = _chosen(path)
        return _from_values((value for value in _json_values(path, keys) if value[1] not in chosen), keys)
    raise UserError(f"--config {path}: a config is a file in Python, YAML or JSON (.py, .yaml, .yml, .json)")


def find(name: str) -> tuple[Path, str | None]:
    """(file, argument of its get_config or None) of a value of --config; UserError where there is no such file."""
    bare, ships = re.fullmatch(r"([^./\\:]+)(?::(.*))?", name), shipped()
    if bare and bare[1] in ships:
        return ships[bare[1]], bare[2]
    given = re.fullmatch(r"(.*\.py):(.*)", name, re.DOTALL)
    path = Path(given[1] if given else name)
    if path.is_dir():
        hint = f"; did you mean {path / 'config.json'}?" if (path / "config.json").is_file() else ""
        raise UserError(f"--config {path}: is a directory, not a file{hint}")
    if bare:
        raise UserError(f"--config {name}: no config of that name ships{did_you_mean(bare[1], ships)}")
    if not path.is_file():
        hint = f"that name ships, so --config {path.stem} finds it" if path.stem in ships else listed()
        raise UserError(f"--config {path}: no such file; {hint}")
    return path, given[2] if given else None


def shipped() -> dict[str, Path]:
    """{name: file} of the configs that come with ftjax: inside the package where it is installed, else beside it."""
    package = Path(ftjax.__file__).parent
    folders = [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]
    return {path.stem: path for folder in folders[:1] for path in sorted(folder.glob("[!_]*.py"))}


def listed() -> str:
    """The configs that ship, one a line, as the end of a message."""
    ships = shipped()
    if not ships:
        return "name a file (.py, .yaml, .json)"
    width = max(map(len, ships), default=0)
    lines = [f"  {name:{width}}  {_summary(path)}" for name, path in ships.items()]
    return "\n".join(["name a file (.py, .yaml, .json) or one of these, which ship with ftjax:", *lines])


def _summary(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _from_python(path: Path, argument: str | None, keys: Mapping[str, Key]) -> ConfigDict:
    try:
        config = runpy.run_path(str(path), run_name="ftjax_config")["get_config"](
            *[] if argument is None else [argument]
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}:{_line(error, path)}: {_explained(error, keys)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: its get_config() returns no ConfigDict; begin it with ftjax.config.defaults()")
    return config.lock()


def _line(error: Exception, path: Path) -> int:
    """The line of the config file at which an error arose."""
    if isinstance(error, SyntaxError) and error.filename == str(path) and error.lineno:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else 1


# What ml_collections says of a value of another type than the key's, of a key that there is none of, to set or to read.
_CAST = re.compile(
    r"Could not override field '(\w+)'.*?\. (.*) is of original type <class '([\w.]+)'> and cannot be casted to type "
    r"<class '([\w.]+)'>",
    re.DOTALL,
)
_LOCKED = re.compile(r'Key "(\w+)" does not exist and cannot be added')
_ABSENT = re.compile(r"""['"\\]*(\w+)['"\\]*(\\n|\n|$)""")


def _explained(error: Exception, keys: Mapping[str, Key]) -> str:
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, KeyError) and text == "get_config":
        return "has no function get_config(); see configs/chat.py"
    if match := _CAST.search(text):
        return _mistyped(*match.groups())
    match = _LOCKED.search(text) or (isinstance(error, AttributeError) and _ABSENT.match(text))
    if match:
        return configs.unknown_key(match[1], keys)
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _mistyped(key: str, value: str, given: str, wanted: str) -> str:
    if wanted == "tuple" and given != "list":
        entry = repr(value) if given == "str" else "{...}" if given.endswith(("dict", "ConfigDict")) else value.strip()
        return f"{key} must be a tuple, also where it holds only one; write ({entry},)"
    return f"{key} must be of the type {wanted}, and {' '.join(value.split())!r} is of {given.rsplit('.', 1)[-1]}"


Value = tuple[str, str, Any]  # where it stands, the dotted key, the value


def _from_values(values: Iterator[Value], keys: Mapping[str, Key]) -> ConfigDict:
    config = configs.defaults(keys)
    for where, key, value in values:
        try:
            configs.assign(config, key, _fitted(key, value, keys), keys)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return config


def _fitted(key: str, value: Any, keys: Mapping[str, Key]) -> Any:
    """A value of YAML or JSON as the key wants it: one entry of a tuple may stand alone, and 2 is a float as well."""
    default = keys[key].default if key in keys else None
    if isinstance(default, tuple) and isinstance(value, str | dict):
        return (value,)
    return value


def _is_section(key: str, keys: Mapping[str, Key]) -> bool:
    return any(name.startswith(f"{key}.") for name in keys)


def _json_values(path: Path, keys: Mapping[str, Key]) -> Iterator[Value]:
    try:
        given = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: must hold an object of keys and values, and holds a {type(given).__name__}")
    yield from _members(given, str(path), "", keys)


def _chosen(path: Path) -> set[str]:
    """The keys of a run's config.json that the run chose for its data, model and devices: open again for another."""
    record = path.with_name("origin.json")
    if path.name != "config.json" or not record.is_file():
        return set()
    return set(strict_json.loads(record.read_text(encoding="utf-8")).get("chosen", ()))


def _members(given: dict, where: str, section: str, keys: Mapping[str, Key]) -> Iterator[Value]:
    for name, value in given.items():
        key = f"{section}{name}"
        if isinstance(value, dict) and _is_section(key, keys):
            yield from _members(value, where, f"{key}.", keys)
        else:
            yield where, key, value


class _Loader(yaml.SafeLoader):
    """YAML 1.2's reading of plain words: 1e-4 is a number, and `on`, `yes` and 2026-01-01 are strings."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - SafeLoader's own, not to be inherited


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _yaml_values(path: Path, keys: Mapping[str, Key]) -> Iterator[Value]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if node is not None:  # an empty file changes nothing
            yield from _node_values(loader, node, path, "", keys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML ({error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def _node_values(
    loader: _Loader, node: yaml.Node, path: Path, section: str, keys: Mapping[str, Key]
) -> Iterator[Value]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: must hold keys and values, such as `epochs: 2`")
    seen = set()
    for name, value in node.value:
        where, key = f"{path}:{name.start_mark.line + 1}", f"{section}{loader.construct_object(name)}"
        if key in seen:
            raise UserError(f"{where}: {key!r} stands there twice")
        seen.add(key)
        if _is_section(key, keys) and isinstance(value, yaml.MappingNode):
            yield from _node_values(loader, value, path, f"{key}.", keys)
        elif not _is_section(key, keys) or value.tag != "tag:yaml.org,2002:null":  # an empty section changes nothing
            yield where, key, loader.construct_object(value, deep=True)
