# SPDX-License-Identifier: Apache-2.0
"""Listening unix sockets that only their owner may connect to.

Decides how a socket gets its permissions before it becomes visible. Must not know the protocol spoken over it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

_MODE = 0o600


def bind_private(path: str, *, owner: tuple[int, int] | None = None, backlog: int = 16) -> socket.socket:
    """A listening unix socket that only its owner may use; replaces a stale socket file.

    The permissions are never wider, not even for a moment: on bind, the file takes the mode of the socket, less the
    umask. The umask is left alone because it belongs to the whole process. The folder must be ours. Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), _MODE)
        sock.bind(path)
        if stat.S_IMODE(os.lstat(path).st_mode) != _MODE:  # the umask removed the owner's permissions as well
            os.chmod(path, _MODE)
        if owner is not None:
            os.chown(path, *owner)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
