"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the file, line or key and the mend. Command lines print it without a traceback and exit with
    status 2 (`ftjax.cli`). What can be known before step 1 is raised before it, and before anything is overwritten.
    """
