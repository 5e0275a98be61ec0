"""Errors that are reported in one message: a mistake that the user can fix, or trouble that may pass by itself."""

import difflib
from collections.abc import Collection

_LISTED = 12  # names that fit into a message beside a suggestion


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the file, line or key and the fix. Command lines print it without a traceback and exit with
    status 2 (`ftjax.cli`). What can be known before step 1 is raised before it, and before anything is overwritten.
    """


class TransientError(UserError):
    """Reported in the same way, but no mistake: the same command may succeed later. Status 1, which launchers retry."""


class SourceError(UserError):
    """A whole file or data set fails while its rows are read: it was changed, or cannot be read any more.

    Never a bad row: `data.max_bad_rows` does not skip it, and nothing is kept in a cache after it.
    """


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", the known names, or both if they are few."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    listed = f"known: {', '.join(sorted(known))}"
    if not close:
        return f"; {listed}"
    return f"; did you mean {close[0]!r}?" + (f" {listed}" if len(known) <= _LISTED else "")
