"""What every command line shares: flags, and mistakes told in one message instead of a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ftjax.errors import UserError

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved on SIGTERM; the same command goes on
EXIT_INTERRUPTED = 130  # Ctrl-C


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses flags, runs `main` and exits with its status (None is 0).

    UserError, and an error while the config file or its overrides are read, end with status 2 and one message.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def config_of(flag: flags.FlagHolder) -> ConfigDict:
    """The value of a config-file flag; UserError where it was not given or its file does not load."""
    try:
        config = flag.value
    except OSError as error:
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from error
    if not isinstance(config, ConfigDict):
        raise UserError("--config is missing; for example --config configs/quickstart.py")
    return config


def config_name() -> str:
    """`quickstart` for --config configs/quickstart.py:args."""
    return Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{error}. --help shows the flags") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections says which key, and suggests a near one.
        raise UserError(f"the config was refused: {' '.join(str(error.args[0]).split())}") from error
