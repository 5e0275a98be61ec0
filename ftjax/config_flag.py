"""The flag --config, and --config.KEY=VALUE beside it, each value read by the type of its key."""

import ast
import contextlib
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ftjax import cli, config_files, foreign
from ftjax import config as configs
from ftjax.config import Key
from ftjax.errors import UserError

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_overrides: list[tuple[str, str]] = []  # of the command line, in its order


def define(default: str | None = None) -> None:
    """Defines the flag in the name of the main module, so that its --help shows it."""
    text = (
        "the name of a config that ships (chat, dpo, ...), or a file (.py, .yaml, .json); --config.KEY=VALUE sets a key"
    )
    flags.DEFINE_string("config", default, text, module_name=sys.argv[0])


def parse(argv: list[str], keys: Mapping[str, Key] = configs.KEYS) -> list[str]:
    """The `parse` of `cli.run` for a command with a config: keeps the overrides, gives absl the rest."""
    rest, _overrides[:] = take_overrides(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))
    try:
        return cli.parse(rest)
    except UserError as error:
        unknown = error.__cause__
        text = str(getattr(unknown, "flagvalue", "")).partition("=")[2]  # of the whole argument, --epochs=3
        if isinstance(unknown, flags.UnrecognizedFlagError) and (hint := _meant(unknown.flagname, text, keys)):
            raise UserError(f"there is no flag --{unknown.flagname}{hint}") from error
        raise


def value(keys: Mapping[str, Key] = configs.KEYS) -> ConfigDict:
    """The config of the command line, overrides included; UserError where none is given or it cannot be read.

    keys: those that it may have.
    """
    if not flags.FLAGS.config:
        raise UserError(f"--config is missing; {config_files.listed()}")
    return overridden(config_files.load(flags.FLAGS.config, keys), _overrides, keys)


def overrides() -> list[tuple[str, str]]:
    """The --config.KEY=VALUE of the command line, [(key, text)]."""
    return list(_overrides)


def name() -> str:
    """`quickstart` for --config configs/quickstart.py:args; of a run's own config.json the name of its workdir."""
    path, _ = config_files.find(flags.FLAGS.config)
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def take_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, [(key, text)]) of a command line.

    --config.KEY=TEXT and --config.KEY TEXT; --config.KEY alone is "true", and --noconfig.KEY "false".
    """
    rest, overrides, position = [], [], 0
    while position < len(argv):
        argument, following = argv[position], argv[position + 1 :]
        position += 1
        if argument == "--":
            return [*rest, argument, *following], overrides
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            rest.append(argument)
            continue
        negated, key, text = match.groups()
        if negated or text is not None:
            overrides.append((key, "false" if negated else text))
        elif following and not re.match(r"-\D", following[0]):
            overrides.append((key, following[0]))
            position += 1
        else:
            overrides.append((key, "true"))
    return rest, overrides


def overridden(
    config: ConfigDict, overrides: list[tuple[str, str]], keys: Mapping[str, Key] = configs.KEYS
) -> ConfigDict:
    """The config with keys set as a command line says; a tuple that is given several times has all of the entries."""
    values = {}
    for key, text in overrides:
        if key not in keys:
            if sections := [name for name in keys if name.startswith(f"{key}.")]:
                raise UserError(f"--config.{key} is a section; set its keys: {', '.join(sections)}")
            raise UserError(f"--config.{key}: {configs.unknown_key(key, keys)}")
        given = parsed(key, text, keys)
        values[key] = (*values.get(key, ()), *given) if isinstance(given, tuple) else given
    for key, given in values.items():
        configs.assign(config, key, given, keys)
    return config


def parsed(key: str, text: str, keys: Mapping[str, Key] = configs.KEYS) -> bool | int | float | str | tuple:
    """The value of a key that `text` spells on a command line.

    Strings are taken as they stand. A tuple is a Python literal of one, of a list, or of one entry of it ({...} or a
    quoted string); everything else is one string, such as a path with blanks or commas in it.
    """
    wanted = type(keys[key].default)
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if wanted is tuple:
            return _entries(key, text)
        return wanted(text)
    except (ValueError, KeyError):
        raise UserError(f"--config.{key}={text}: must be {_WANTED[wanted]}") from None


def text_of(value: Any) -> str:
    """A value of YAML as it stands behind --config.KEY=, which `parsed` reads as that value."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(tuple(value)) if isinstance(value, list) else str(value)


def spelled(key: str, value: bool | int | float | str | tuple) -> str:
    """`--config.KEY=VALUE` as it is typed in a shell: what `parsed` reads as `value`."""
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return f"--config.{key}={shlex.quote(text)}"


_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def _entries(key: str, text: str) -> tuple:
    literal = None
    if text.lstrip()[:1] in {"(", "[", "{", "'", '"'}:  # of other texts Python may warn: 1or2.jsonl
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            literal = ast.literal_eval(text.strip())
    if isinstance(literal, tuple | list):
        return tuple(literal)
    if isinstance(literal, dict | str):
        return (literal,)
    if literal is None and (text[:1], text[-1:]) in (("(", ")"), ("[", "]"), ("{", "}")):
        raise UserError(f"--config.{key}={text}: is no Python literal; quote what is in it: \"('a.jsonl', 'b.jsonl')\"")
    parts = text.split(",")
    if len(parts) > 1 and not Path(text).exists() and all(Path(part).is_file() for part in parts):
        raise UserError(
            f"--config.{key}={text}: no file of that name, but files {' and '.join(parts)}; give the flag once for each"
        )
    return (text,) if text else ()


def _meant(name: str, text: str, keys: Mapping[str, Key]) -> str:
    """The end of a message about an unknown flag that a key was meant by; "" where none was."""
    same = [key for key in keys if name in (key, key.rpartition(".")[2])]
    theirs = foreign.find(name) if keys is configs.KEYS else None
    if same:
        return f"; did you mean {' or '.join(f'--config.{key}={text}' for key in same)}?"
    if theirs and theirs.key and theirs.note:  # the value may be another one here
        return f"; did you mean --config.{theirs.key}? ({theirs.note})"
    if theirs:
        return f"; did you mean --config.{theirs.key}={text}?" if theirs.key else f": {theirs.note}"
    return ""
