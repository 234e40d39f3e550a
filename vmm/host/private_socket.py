# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets that only their owner may connect to.

Decides how a socket gets its rights before its name. Must not know what is said over it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

_MODE = 0o600


def bind_private(path: str, *, owner: tuple[int, int] | None = None, backlog: int = 16) -> socket.socket:
    """A listening unix socket that only its owner may use, in place of what is left of an older one.

    Its rights are never wider, not even for a moment: the file gets the mode that the socket has when it is bound,
    less the umask, which stays as it is because it is the whole process's. The folder is ours. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), _MODE)
        sock.bind(path)
        if stat.S_IMODE(os.lstat(path).st_mode) != _MODE:  # a umask that takes our own rights, too
            os.chmod(path, _MODE)
        if owner is not None:
            os.chown(path, *owner)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
