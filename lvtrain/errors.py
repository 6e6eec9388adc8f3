"""The one exception that is meant for the user's eyes.

Everything a user can mend (a typo in a recipe, a missing shard, a label out of range) is raised as `UserError` with one line that says
what, where and how to mend it. The front doors print that line and exit with `EXIT_ERROR`; a traceback is shown only with `--debug`.
"""

EXIT_DONE = 0
EXIT_ERROR = 2
EXIT_STOPPED = 75  # stopped early on request, a checkpoint is written, start me again (sysexits' EX_TEMPFAIL)


class UserError(Exception):
    """A mistake the user can mend; its text is one line: what, where, and how to mend it."""


def told(error: Exception, where: object) -> str:
    """The line of a UserError, or of an OSError: a full disk, a forbidden folder. `where` stands for a file that the system does not name."""
    return (
        f"{error.filename or where}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    )
