"""A file system that fails may work again: NFS and Lustre answer EIO, ESTALE, EACCES or ETIMEDOUT for a moment while a server changes over.

Such an error says nothing of the file. It is tried again after `WAITS`; what still fails then is raised as it came, an OSError, and ends the process
with exit status 1, as a crash that a chain of jobs repeats. Never is a file deleted or renamed because it could not be read.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lvtrain.errors import UserError

Result = TypeVar("Result")

WAITS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth try
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # the user's to clear, before another start makes sense
FORBIDDEN = FULL | {errno.EACCES, errno.EPERM}  # the same for a folder that is to be made or written for the first time
# what trying again cannot change
_LASTING = FULL | {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EXDEV,
    errno.EFBIG,
    errno.ENOTSUP,
}


def may_pass(error: OSError) -> bool:
    """Whether the same call may work in a moment."""
    return error.errno is not None and error.errno not in _LASTING


def patiently(action: Callable[..., Result], *arguments: Any, **more: Any) -> Result:
    """`action(*arguments, **more)`, tried again while what it raises may pass.

    Raises:
        OSError: it failed for good, or in every try.
    """
    for wait in WAITS:
        try:
            return action(*arguments, **more)
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(wait)
    return action(*arguments, **more)


def in_words(error: OSError, path: Path, advice: str, *, users: frozenset[int] = FULL) -> UserError | OSError:
    """`error` with advice: a UserError where the user must act before another start (`users`), else an OSError, which ends the process with 1."""
    where, what = error.filename or str(path), f"{error.strerror or error}; {advice}"
    if error.errno in users or not may_pass(error):
        return UserError(f"{where}: {what}")
    return OSError(error.errno, what, where)
