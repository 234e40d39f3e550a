# SPDX-License-Identifier: Apache-2.0
"""Unix sockets under names, and private folders for them.

Decides who may connect, from which moment on, and when the name of a dead socket is taken over. Must not know the
protocol spoken over them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from vhdkit import errors
from vhdkit.descriptor import close_owned, opened
from vhdkit.folder_lock import folder_held
from vhdkit.wording import translated

_MAX_SOCKET_BYTES = 107  # sun_path of Linux, without its terminating zero byte
_MODE, _SHARED_MODE = 0o600, 0o660
_BACKLOG = 128  # clients waiting to be accepted


class SocketFile:
    """A Unix socket that listens under a name: private from its first moment, and removed by `close`.

    A stale socket, on which no process listens, is replaced; anything else under the name is left alone.
    """

    def __init__(self, path: str, *, owner: tuple[int, int | None] | None = None) -> None:
        """Only the user may connect, or the user id in `owner` and, if it has a group id, members of that group.

        Raises AddressInUse, AlreadyExists, InvalidArgument (too long a path), NotFound, AccessDenied.
        """
        self.path = path
        size = len(os.fsencode(path))
        if size > _MAX_SOCKET_BYTES:
            raise errors.InvalidArgument(
                f"the path of a socket has at most {_MAX_SOCKET_BYTES} bytes, not {size}",
                path=path,
                hint="choose a shorter one, or change to its folder and give only the name",
            )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._identity: tuple[int, int] | None = None
        try:
            with translated(path, "create the socket"), folder_held(os.path.dirname(path)):
                self._take_over_name()
                self._bind(owner)
        except BaseException:
            self.close()
            raise

    def _bind(self, owner: tuple[int, int | None] | None) -> None:
        # At bind the file gets at most the mode that the socket has: it never has a wider one, and the umask, which
        # belongs to the process and not the thread, need not change.
        os.fchmod(self.socket.fileno(), _MODE)
        self.socket.bind(self.path)
        owned = opened(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)  # what the name leads to now
        try:
            status = os.fstat(owned[0])
            if not stat.S_ISSOCK(status.st_mode):
                raise errors.Replaced("was replaced while the socket was created", path=self.path)
            self._identity = status.st_dev, status.st_ino
            file = f"/proc/self/fd/{owned[0]}"
            if owner is not None:
                os.chown(file, owner[0], -1 if owner[1] is None else owner[1])
            mode = _MODE if owner is None or owner[1] is None else _SHARED_MODE
            if stat.S_IMODE(status.st_mode) != mode:
                os.chmod(file, mode)
        finally:
            close_owned(owned)
        self.socket.listen(_BACKLOG)  # still under the folder's lock: until it listens, it could be taken over

    def _take_over_name(self) -> None:
        """Unlink a stale socket, on which no process listens."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise errors.AlreadyExists("exists and is not a socket: it is not replaced", path=self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):  # listening, but busy or of another type
                    raise
        raise errors.AddressInUse("another program is listening there", path=self.path)

    def close(self) -> None:
        """Remove the name, unless it now leads to another socket, and close. Closing twice is fine."""
        if self._identity is not None:
            with contextlib.suppress(OSError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.path)
            self._identity = None
        self.socket.close()


class PrivateFolder:
    """A new folder that only the user (or `owner`) may enter, for sockets; removed by `close` when it is empty."""

    def __init__(self, *, owner: tuple[int, int | None] | None = None) -> None:
        """In the user's runtime folder, or where temporary files go. Raises AccessDenied, NoSpace, IoFailed."""
        from tempfile import mkdtemp  # a slow import, and few sockets have a folder of their own

        runtime = os.environ.get("XDG_RUNTIME_DIR")
        parent = runtime if runtime and os.path.isdir(runtime) and os.access(runtime, os.W_OK) else None
        with translated(parent or "temporary files", "create a private folder in"):
            self.path = mkdtemp(prefix="vhdkit-", dir=parent)
            if owner is not None:
                os.chown(self.path, owner[0], -1 if owner[1] is None else owner[1])
                if owner[1] is not None:
                    os.chmod(self.path, 0o750)

    def close(self) -> None:
        """Remove the folder. Closing twice is fine."""
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
