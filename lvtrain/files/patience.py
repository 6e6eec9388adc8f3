"""Retrying after errors of the file system that may pass.

NFS and Lustre answer EIO, ESTALE, EACCES or ETIMEDOUT while a server is replaced. Such an error does not mean that the
file is bad. The call is tried again after `WAITS`. If it still fails, the OSError is raised as it is. It ends the process
with exit code 1, as a crash does, and a chain of jobs tries again. No file is deleted or renamed because it could not be
read.
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
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # the user must act before another start can work
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
    """Calls `action(*arguments, **more)`, and again after an error that may pass.

    Raises:
        OSError: it will not pass, or it came in every try.
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
    """`error` with advice.

    It becomes a UserError if the user must act before another start (`users` holds those errors' numbers). Otherwise it
    remains an OSError, which ends the process with exit code 1.
    """
    where, what = error.filename or str(path), f"{error.strerror or error}; {advice}"
    if error.errno in users or not may_pass(error):
        return UserError(f"{where}: {what}")
    return OSError(error.errno, what, where)
