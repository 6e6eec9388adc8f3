"""The one exception that is meant for the user, and how command lines show it.

Everything that a user can fix (a typo in a recipe, a missing shard, a label out of range) is raised as `UserError`, with one
line that says what happened, where, and what to do. Command lines print that line and exit with `EXIT_ERROR`; they show a
traceback only with `--debug`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_ERROR = 2
EXIT_STOPPED = 75  # stopped on request, with a checkpoint; the same command resumes (EX_TEMPFAIL of sysexits)
LOST_RANK = "another rank has ended; its own error line, or the log of its node, says why"
# in the words of gloo, of torch's store and of NCCL
_GONE = re.compile(
    "closed by peer|reset by peer|Broken pipe|Connection was likely closed|remote process exited|Timed out waiting|Read timeout"
)


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line: what, where, and how to fix it."""


def error_line(error: Exception, where: object) -> str:
    """One line for a UserError or an OSError. `where` is named when an OSError names no file.

    Line breaks and control characters, which a name in it may hold, are escaped: they would forge lines.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or where}: {error.strerror}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether an error only means that another rank is gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and _GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def quiet_torch() -> None:
    """Keeps the stacks of torch's C++ log off the screen, where a rank is gone. Read when torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@contextmanager
def one_line_errors(program: str, where: object = "a file", *, debug: bool = False) -> Iterator[None]:
    """Prints a UserError or OSError as `PROGRAM: error: LINE` on standard error and exits with `EXIT_ERROR`.

    Where another rank is gone, the line says so, and the exit code is 1.

    `where` is named when an OSError names no file. With `debug` the error is raised, so its traceback is seen.
    """
    quiet_torch()
    try:
        yield
    except RuntimeError as error:
        if debug or not is_lost_rank(error):
            raise
        print(f"{program}: error: {LOST_RANK}", file=sys.stderr)
        raise SystemExit(1) from None
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"{program}: error: {error_line(error, where)}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None
