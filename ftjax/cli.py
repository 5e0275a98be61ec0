"""What every command line shares: flags, and mistakes reported in one message instead of a traceback."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from ftjax import cache
from ftjax.errors import TransientError, UserError

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved on SIGTERM; the same command goes on
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PIPE = 141  # nobody reads the output any more, as after `| head -1`; what shells report of a SIGPIPE

# The name of threads that a command does not wait for where it fails or is stopped.
UNNEEDED = "of use only to what follows"


def parse(argv: list[str]) -> list[str]:
    """The arguments that are no flags; UserError for a flag that is unknown or has a wrong value."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{str(error).splitlines()[-1]}. --help shows the flags") from error


def run(main: Callable[[list[str]], int | None], parse: Callable[[list[str]], list[str]] = parse) -> None:
    """Parses flags, runs `main` and exits with its status (None is 0). UserError ends with status 2 and one message.

    parse: what parses the flags; `config_flag.parse` where there is a config.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see ftjax/__init__.py
    if {"--help", "-help", "-h", "-?", "--helpshort"} & set(sys.argv[1:]):  # absl's own ends with status 1
        with piped():
            print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    _keep_compiled()
    _give_back_what_compiling_took()
    absl_logging.set_verbosity(absl_logging.ERROR)
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("warning: %(message)s"))
    logger = logging.getLogger("ftjax")
    logger.addHandler(warnings)
    logger.propagate = False
    # Orbax's threads log the traceback of an error that its caller gets, and reports, as well.
    absl_logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    exit_with(lambda: app.run(main, flags_parser=parse))


_COMPILED = 4 * 2**30  # bytes of compiled programs that are kept, those used last
_LONG = 1.0  # seconds of compilation after which there is memory to give back


def _keep_compiled() -> None:
    """Lets JAX keep what it compiles under $FTJAX_CACHE, so that a later command with the same shapes need not.

    Not where JAX has been told of another directory, or where this one cannot be written. The limit of the size makes
    JAX lock the directory, for which several processes may then use it. Programs for a CPU are of its own instructions.
    """
    import jax  # at the top it would be loaded for messages about flags, too

    if jax.config.jax_compilation_cache_dir or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    try:
        directory = cache.directory(f"compiled/{_instructions()}")
    except UserError:  # what needs the cache says so; nothing needs this
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", _COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def give_back_memory() -> None:
    """Lets glibc give the system what it keeps of memory that is no longer used; other libraries are left alone."""
    if release := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        release(0)


def _give_back_what_compiling_took() -> None:
    """180 MB for a step of SmolLM2, which peaks after it."""
    import jax

    def compiled(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and seconds > _LONG:
            give_back_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _instructions() -> str:
    """A short name of the kind of CPU: homes are shared by machines that are not alike."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with its status (None is 0); mistakes end with their status and one message."""
    with piped():
        try:
            status, at_once = main(), False
        except SystemExit as error:  # absl ends with the status that its main returns
            status, at_once = error.code, False
        except (UserError, OSError, KeyboardInterrupt) as error:
            if _is_unread(error):
                raise
            status, text = explain(error)
            print(text, file=sys.stderr)
            at_once = isinstance(error, KeyboardInterrupt)
        if at_once or (isinstance(status, int) and status and _is_unneeded_running()):
            # The interpreter's own end would wait for threads, or take devices away from what they still compute, and
            # crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


def _is_unneeded_running() -> bool:
    return any(thread.name == UNNEEDED for thread in threading.enumerate())


@contextlib.contextmanager
def piped() -> Iterator[None]:
    """Ends the process quietly where what reads its output is gone, as the programs of a shell do."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError as error:
        if not _is_unread(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the exit, too
        sys.exit(EXIT_PIPE)


def _is_unread(error: BaseException) -> bool:
    """Whether the error is that of a pipe of which nobody reads our output any more; sockets break alike."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


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
