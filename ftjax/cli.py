"""What every command line shares: flags, and mistakes reported in one message instead of a traceback."""

import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from ftjax.errors import TransientError, UserError

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved on SIGTERM; the same command goes on
EXIT_INTERRUPTED = 130  # Ctrl-C


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses flags, runs `main` and exits with its status (None is 0).

    UserError, and an error while the config file or its overrides are read, end with status 2 and one message.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see ftjax/__init__.py
    absl_logging.set_verbosity(absl_logging.ERROR)
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("ftjax")
    logger.addHandler(warnings)
    logger.propagate = False
    # Orbax's threads log the traceback of an error that its caller gets, and reports, as well.
    absl_logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    try:
        app.run(main, flags_parser=_parse)
    except (UserError, OSError, KeyboardInterrupt) as error:
        status, text = explain(error)
        print(text, file=sys.stderr)
        sys.exit(status)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status that an error ends a command line with, and what is printed."""
    if isinstance(error, TransientError | OSError):  # such as a full disk: a traceback would explain nothing
        return 1, f"error: {error}"
    if isinstance(error, UserError):
        return EXIT_MISTAKE, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) and error.code else 1), f"ended with {error.code}"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def config_of(flag: flags.FlagHolder) -> ConfigDict:
    """The value of a config-file flag; UserError where it is missing or its file does not load."""
    if not flag.present:
        raise UserError("--config is missing; for example --config configs/quickstart.py")
    try:
        config = flag.value
    except OSError as error:
        raise UserError(_not_loaded(error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config {_config_file()}: no such file, or its get_config() returns no ConfigDict")
    return config


def config_name() -> str:
    """`quickstart` for --config configs/quickstart.py:args."""
    return Path(_config_file().split(":", 1)[0]).stem


def _config_file() -> str:
    return config_flags.get_config_filename(flags.FLAGS["config"])


def _not_loaded(error: Exception) -> str:
    return f"the config file does not load: {type(error).__name__}: {str(error).splitlines()[-1].strip()}"


# What ml_collections says of a value that does not fit the default of its key.
_CAST = re.compile(
    r"Could not override field '(\w+)'.*?\. (.*) is of original type <class '([\w.]+)'> and cannot be casted to type "
    r"<class '([\w.]+)'>",
    re.DOTALL,
)


def _mistyped(key: str, value: str, given: str, wanted: str) -> str:
    if wanted == "tuple" and given != "list":
        entry = repr(value) if given == "str" else "{...}" if given.endswith(("dict", "ConfigDict")) else value.strip()
        return f"{key} must be a tuple, also where it holds only one; write ({entry},)"
    return f"{key} must be of the type {wanted}, and {' '.join(value.split())!r} is of {given.rsplit('.', 1)[-1]}"


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if refused := _CAST.search(str(error)):
            raise UserError(f"the config was refused: {_mistyped(*refused.groups())}") from error
        raise UserError(f"{str(error).splitlines()[-1]}. --help shows the flags") from error
    except (OSError, SyntaxError, ImportError, NameError) as error:
        raise UserError(_not_loaded(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections says which key, and suggests a near one.
        raise UserError(f"the config was refused: {' '.join(str(error.args[0]).split())}") from error
