"""The exceptions that are told in one message: a mistake that the user can mend, and what may pass by itself."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the file, line or key and the mend. Command lines print it without a traceback and exit with
    status 2 (`ftjax.cli`). What can be known before step 1 is raised before it, and before anything is overwritten.
    """


class TransientError(UserError):
    """Told in the same way, but no mistake: the same command may succeed later. Status 1, which launchers repeat."""


class SourceError(UserError):
    """Trouble with a whole file or data set while its rows are read: it was changed, or cannot be read any more.

    Never a bad row: what skips these (`data.max_bad_rows`) lets it pass, and nothing is kept in a cache after it.
    """
