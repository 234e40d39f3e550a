# SPDX-License-Identifier: Apache-2.0
"""The typed errors for the system's errors.

Decides which typed error an errno becomes, and its wording. Must not know what was being done, nor to what.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from vhdkit import errors

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def translate(error: OSError, path: str, doing: str) -> errors.VhdkitError:
    """The typed error for an OSError that occurred while `doing` something to `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    kind: type[errors.VhdkitError] = errors.IoFailed
    hint = None
    if error.errno in _NO_SPACE:
        kind = errors.NoSpace
        hint = "free some space or choose another file system"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        kind = errors.NotFound
    elif error.errno in (errno.EACCES, errno.EPERM):
        kind = errors.AccessDenied
    elif error.errno == errno.EROFS:
        kind = errors.ReadOnly
    elif error.errno == errno.EEXIST:
        kind = errors.AlreadyExists
    elif error.errno in (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
        kind = errors.InvalidArgument
    return kind(f"cannot {doing}: {reason}", path=path, hint=hint)


@contextlib.contextmanager
def translated(path: str, doing: str) -> Iterator[None]:
    """Translate any OSError of the block into the typed error."""
    try:
        yield
    except OSError as error:
        raise translate(error, path, doing) from error
